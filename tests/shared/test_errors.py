"""Every refusal survives the wire as itself, and every foreign answer becomes some refusal."""

from __future__ import annotations

import http
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.wire import errors
from shared.wire.errors import BY_CODE, BY_STATUS, OracleError, UnexpectedAnswer, from_problem


def descendants(cls: type[OracleError]) -> set[type[OracleError]]:
    return {cls}.union(*(descendants(sub) for sub in cls.__subclasses__() if sub.__module__ == errors.__name__))


REFUSALS = sorted(descendants(OracleError) - {OracleError, UnexpectedAnswer}, key=lambda cls: cls.__name__)
every_refusal = pytest.mark.parametrize("cls", REFUSALS)


@every_refusal
def test_round_trip(cls: type[OracleError]) -> None:
    extensions = {"remaining": 7, "requested": 12, "nested": {"max_rows": [1, 2]}, "why": "too many"}
    sent = cls("try less", retry_after=1.5, **extensions)
    problem = sent.problem()
    read = from_problem(problem["status"], json.dumps(problem).encode(), retry_after=1.5)
    assert type(read) is cls
    assert read.status == sent.status == problem["status"]
    assert (read.detail, str(read), read.retry_after) == ("try less", "try less", 1.5)
    assert read.extensions == extensions


@every_refusal
def test_problem_carries_both_standards(cls: type[OracleError]) -> None:
    problem = cls("try less").problem()
    # RFC 9457, and the `error` string of the Open Inference Protocol.
    assert problem["type"] == f"urn:zo-defense:error:{cls.code}"
    assert problem["error"] == problem["detail"] == "try less"
    assert problem["title"]
    assert 400 <= problem["status"] < 600


def test_codes_are_complete_and_distinct() -> None:
    assert set(BY_CODE.values()) == set(REFUSALS)
    assert all(BY_CODE[cls.code] is cls for cls in REFUSALS)
    assert UnexpectedAnswer.code not in BY_CODE


def test_the_documented_tree_is_the_tree() -> None:
    # Names with their depth in the drawing; a class's parent is the last one drawn less deep.
    drawn: list[tuple[int, str, int | None]] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"^ {4}([│ ]*(?:[├└]── )?)([A-Z]\w+)(?: +(\d{3}|any) )?", line):
            drawn.append((len(found[1]), found[2], int(found[3]) if (found[3] or "any") != "any" else None))
    assert {name for _, name, _ in drawn} == {cls.__name__ for cls in descendants(OracleError)}
    for i, (depth, name, status) in enumerate(drawn):
        cls = getattr(errors, name)
        if status is None and "Forbidden" in [base.__name__ for base in cls.__mro__]:
            status = 403
        assert status in (None, cls.status)
        parent = next((other for d, other, _ in reversed(drawn[:i]) if d < depth), None)
        assert parent is None or cls.__bases__ == (getattr(errors, parent),)


FOREIGN = {
    "the protocol's": b'{"error": "no"}',
    "FastAPI's": b'{"detail": "no"}',
    "unknown code": b'{"code": "brand-new", "detail": "no"}',
    "a plain line": b"no",
}


@pytest.mark.parametrize("body", FOREIGN.values(), ids=FOREIGN)
def test_every_status_of_a_foreign_server(body: bytes) -> None:
    for status in range(400, 600):
        error = from_problem(status, body, retry_after=2.0)
        if status in BY_STATUS:
            assert type(error) is BY_STATUS[status]
            assert error.status == status
            assert error.detail == "no"
        else:
            assert type(error) is UnexpectedAnswer
            assert error.extensions["answered_status"] == status
            assert str(status) in error.detail
            assert error.detail.endswith("no")
        assert error.retry_after == 2.0


def test_statuses_lead_to_their_most_general_class() -> None:
    for status, cls in BY_STATUS.items():
        assert cls.status == status
        assert http.HTTPStatus(status)
    assert set(BY_STATUS) == {cls.status for cls in REFUSALS}
    assert BY_STATUS[403] is errors.Forbidden


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "HTTP status 503 without a body"),
        (b"  \n", "HTTP status 503 without a body"),
        (b"<html>Bad gateway</html>", "<html>Bad gateway</html>"),
        (b"\xff\xfe\x00x", None),
        (b"[1, 2]", "[1, 2]"),
        (b'"text"', '"text"'),
        (b"null", "null"),
        (b"{}", "HTTP status 503"),
        (b'{"detail": ["a list"]}', "['a list']"),
        (b"[" * 100_000, None),
        (b'{"detail": ' + b"9" * 5000 + b"}", None),
    ],
)
def test_bodies_that_are_no_problem(body: bytes, detail: str | None) -> None:
    error = from_problem(503, body)
    assert type(error) is errors.Unavailable
    assert error.detail == detail if detail is not None else error.detail
    assert len(error.detail) <= 500


@pytest.mark.parametrize("key", ["self", "cls", "args", "retry_after", "__class__", ""])
def test_field_names_of_a_foreign_problem_do_no_harm(key: str) -> None:
    error = from_problem(429, json.dumps({"error": "slow down", key: 5}).encode(), retry_after=3.0)
    assert type(error) is errors.RateLimited
    assert (error.detail, error.retry_after) == ("slow down", 3.0)


def test_our_code_wins_over_the_status() -> None:
    assert type(from_problem(403, b'{"code": "budget-exhausted", "error": "no"}')) is errors.BudgetExhausted
    assert type(from_problem(422, b'{"code": "idempotency-conflict", "error": "no"}')) is errors.IdempotencyConflict


fields = st.sampled_from(["type", "title", "status", "detail", "error", "code", "retry_after", "self"])
values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=9), st.lists, max_leaves=4)
problems = st.dictionaries(fields | st.text(max_size=5), values).map(lambda p: json.dumps(p).encode())


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(status=st.integers(400, 999), body=st.binary(max_size=100) | problems)
def test_reading_an_answer_never_raises(status: int, body: bytes) -> None:
    error = from_problem(status, body)
    assert isinstance(error, OracleError)
    assert error.detail
