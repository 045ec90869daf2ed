"""The OpenAPI document against the live server: every route, drawn by schemathesis, with a key and without."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle_support import Caller, Running
from schemathesis import GenerationMode, checks
from schemathesis.checks import CheckFunction

from shared.wire.errors import PROBLEM_CONTENT_TYPE

# What is documented does not depend on the ledger's database.
pytestmark = pytest.mark.parametrize("server", ["sqlite"], indirect=True)
EXAMPLES = 30  # of each operation, within the document and beyond it, with a key and without
CHECKS: list[CheckFunction] = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
    checks.ignored_auth,
]
# As the document of the live server has them; `test_every_route_is_tried` compares.
OPERATIONS = [
    "GET /v2",
    "GET /v2/health/live",
    "GET /v2/health/ready",
    "POST /v2/repository/index",
    "GET /v1/decoders",
    "POST /v1/decoders",
    "DELETE /v1/decoders/{decoder}",
    "GET /v1/budget",
    "GET /v1/charges",
    "GET /v1/dashboard",
    "GET /v1/ledger",
    "GET /metrics",
    "GET /v2/models/{model}",
    "GET /v2/models/{model}/ready",
    "POST /v2/models/{model}/infer",
]


def document_of(server: Running) -> dict[str, Any]:
    answer: dict[str, Any] = server.http.get("/openapi.json").json()
    return answer


def test_every_route_is_tried(server: Running) -> None:
    paths = document_of(server)["paths"]
    assert sorted(f"{method.upper()} {path}" for path in paths for method in paths[path]) == sorted(OPERATIONS)


@pytest.mark.parametrize("with_key", [True, False], ids=["key", "no key"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_answers_are_as_documented(server: Running, caller: Caller, operation: str, with_key: bool) -> None:
    method, path = operation.split()
    schema = schemathesis.openapi.from_dict(document_of(server))
    drawn = schema[path][method]
    modes = [GenerationMode.POSITIVE]
    if {"parameters", "requestBody"} & set(drawn.definition.raw):  # else there is nothing to get wrong
        modes.append(GenerationMode.NEGATIVE)
    cases = st.one_of(*(drawn.as_strategy(mode) for mode in modes))
    seen: set[int] = set()

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(cases)
    def run(case: schemathesis.Case) -> None:
        headers = caller.headers if with_key else {}
        seen.add(case.call_and_validate(base_url=server.url, headers=headers, checks=CHECKS).status_code)

    run()
    protected = "security" in drawn.definition.raw
    assert seen & ({401} if protected and not with_key else {200, 400} if method != "DELETE" else {404})
    assert server.http.get("/v2").status_code == 200
    assert caller.budget()["spent"] == 0


def test_every_documented_refusal_is_a_problem(server: Running) -> None:
    document = document_of(server)
    for path, item in document["paths"].items():
        for operation in item.values():
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert set(answer["content"]) == {PROBLEM_CONTENT_TYPE}, (path, status)
    assert "HTTPValidationError" not in document["components"]["schemas"]
