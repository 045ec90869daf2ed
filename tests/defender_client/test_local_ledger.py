"""The client's own ledger: the budget holds whatever happens, and whoever has not the key cannot change a line."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from foreign_support import classify
from oracle_support import digits

from defender_client.endpoint import PythonEndpoint
from defender_client.errors import ConfigError
from defender_client.foreign import ForeignOracle
from defender_client.local_audit import audit_local
from defender_client.local_ledger import KEY_FILE, LEDGER_FILE, Asked, LocalLedger, local_statement
from defender_client.offline_audit import audit_file
from defender_client.pinning import PIN_FILE, pinned
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.recording import ANSWERS_FILE
from defender_client.request_key import RequestKey
from defender_client.sources import ForeignSource
from shared.wire.errors import BudgetExhausted

ASKED = Asked("somewhere", "in one way")
ENDPOINT = PythonEndpoint(protocol="python", callable="foreign_support:classify", rows=8)


def key(label: str) -> RequestKey:
    return RequestKey.of("run", label, "0" * 64)


@contextmanager
def ledger_of(run: Path, budget: int | None = None, asked: Asked = ASKED) -> Iterator[LocalLedger]:
    ledger = LocalLedger(run, asked, budget)
    try:
        yield ledger
    finally:
        ledger.close()


@contextmanager
def opened(run: Path, budget: int | None = 1000) -> Iterator[ForeignOracle]:
    with ForeignSource(ENDPOINT, budget=budget).open(run, "run") as oracle:
        yield oracle


def test_threads_cannot_exceed_the_budget_together(tmp_path: Path) -> None:
    with ledger_of(tmp_path, 100) as ledger:
        refused = threading.Event()

        def spend(name: int) -> None:
            for number in range(20):
                try:
                    reserved = ledger.reserve(key(f"{name}/{number}"), "train", 7, "0" * 64)
                except BudgetExhausted:
                    refused.set()
                    return
                ledger.charge(reserved)

        threads = [threading.Thread(target=spend, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert refused.is_set()
        statement = ledger.statement()
    assert (statement.spent, statement.held, statement.remaining) == (98, 0, 2)
    kept = pinned(tmp_path)
    assert kept is not None
    found = audit_file(tmp_path / LEDGER_FILE, bytes.fromhex(kept.public_key))
    assert found.differences == ()
    assert found.clients[0].spent == 98


def test_what_was_under_way_at_a_kill_is_paid(tmp_path: Path) -> None:
    with ledger_of(tmp_path, 100) as ledger:
        ledger.charge(ledger.reserve(key("a"), "train", 10, "0" * 64))
        ledger.reserve(key("b"), "train", 20, "0" * 64)
        assert ledger.statement().held == 20
    with (tmp_path / LEDGER_FILE).open("ab") as file:
        file.write(b'{"entry":{"amount":null,')  # and the kill came while the next line was written
    left = local_statement(tmp_path)
    assert left is not None
    assert (left.spent, left.remaining) == (30, 70)
    with ledger_of(tmp_path) as ledger:
        assert (ledger.statement().spent, ledger.statement().held) == (30, 0)
        with pytest.raises(BudgetExhausted, match="71 more were not sent"):
            ledger.reserve(key("c"), "train", 71, "0" * 64)
        # Asked again, it is another purchase.
        again = ledger.reserve(key("b"), "train", 20, "0" * 64)
        assert again.idempotency_key == str(RequestKey("run", "b~2", "0" * 24))
        ledger.release(again, "refused")
        assert ledger.reserve(key("b"), "train", 70, "0" * 64).idempotency_key == again.idempotency_key


def test_the_budget_is_raised_in_the_open_and_never_below_what_is_spent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--budget N"), ledger_of(tmp_path):
        pass
    with ledger_of(tmp_path, 10) as ledger:
        ledger.charge(ledger.reserve(key("a"), "train", 10, "0" * 64))
    with pytest.raises(ConfigError, match="less than this run has spent, 10"), ledger_of(tmp_path, 9):
        pass
    with ledger_of(tmp_path, 15) as ledger:
        assert ledger.statement().remaining == 5
    with ledger_of(tmp_path) as ledger:
        assert ledger.statement().budget == 15
    budgets = [line["entry"]["amount"] for line in lines_of(tmp_path) if line["entry"]["kind"] == "budget"]
    assert budgets == [10, 15]


def lines_of(run: Path) -> list[dict[str, dict[str, object]]]:
    return [json.loads(line) for line in (run / LEDGER_FILE).read_text().splitlines()[1:]]


def test_a_ledger_belongs_to_one_oracle_and_is_not_begun_anew(tmp_path: Path) -> None:
    with ledger_of(tmp_path, 10):
        pass
    with pytest.raises(ConfigError, match="asked in another way"), ledger_of(tmp_path, asked=Asked("x", "in another")):
        pass
    (tmp_path / KEY_FILE).rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is missing"), ledger_of(tmp_path):
        pass
    (tmp_path / "other").mkdir()
    with ledger_of(tmp_path / "other", 10):
        pass
    shutil.copy(tmp_path / "other" / KEY_FILE, tmp_path / KEY_FILE)
    with (
        pytest.raises(ConfigError, match="not what its hash"),
        ledger_of(tmp_path),
    ):
        pass
    shutil.copy(tmp_path / "elsewhere", tmp_path / KEY_FILE)
    (tmp_path / LEDGER_FILE).unlink()
    with pytest.raises(ConfigError, match="was removed"), ledger_of(tmp_path, 10):
        pass


@pytest.fixture(scope="module")
def spent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory in which three requests were answered: to be copied."""
    run = tmp_path_factory.mktemp("spent")
    with opened(run) as oracle:
        for number in range(3):
            images = digits(4, number)
            assert (oracle.query(images, purpose="train", label=f"train/{number}") == classify(images)).all()
    return run


@pytest.fixture
def run(spent: Path, tmp_path: Path) -> Path:
    shutil.copytree(spent, tmp_path / "run")
    return tmp_path / "run"


def test_the_audit_finds_a_run_as_it_was(run: Path, tmp_path: Path) -> None:
    older = tmp_path / "older.jsonl"
    shutil.copy(run / LEDGER_FILE, older)
    with opened(run, None) as oracle:
        oracle.query(digits(4, 9), purpose="train", label="train/9")
    found = audit_local(run, before=older)
    assert found.equal, found.differences
    assert (found.purposes, found.receipts, found.clients[0].spent) == ({"train": 16}, 4, 16)
    # Without the older end, or without any run, it is the same to a stranger who has the key.
    assert audit_file(run / LEDGER_FILE, bytes.fromhex(found.public_key)).equal
    swapped = audit_file(older, bytes.fromhex(found.public_key), before=run / LEDGER_FILE)
    assert "set back" in swapped.differences[0]


DAMAGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "rows": lambda lines: [line.replace(b'"rows":4', b'"rows":3') if i == 4 else line for i, line in enumerate(lines)],
    "budget": lambda lines: [line.replace(b'"amount":1000', b'"amount":9000') for line in lines],
    "taken out": lambda lines: lines[:4] + lines[6:],
    "put in": lambda lines: [*lines[:4], lines[3], *lines[4:]],
    "order": lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
    "signature": lambda lines: [*lines[:-1], lines[-1].replace(b'"signature":"', b'"signature":"00', 1)],
    "other signature": lambda lines: [*lines[:-1], _with_signature_of(lines[-1], lines[-2])],
    "cut at the end": lambda lines: lines[:-2],
    "cut by one": lambda lines: lines[:-1],
}


def _with_signature_of(line: bytes, other: bytes) -> bytes:
    mark = b'"signature":'
    return line.partition(mark)[0] + mark + other.partition(mark)[2]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_audit_finds_every_change(run: Path, damage: str) -> None:
    file = run / LEDGER_FILE
    before = file.read_bytes().splitlines(keepends=True)
    after = DAMAGES[damage](before)
    assert after != before
    file.write_bytes(b"".join(after))
    assert not audit_local(run).equal


def test_lines_cut_off_both_accounts_are_found_by_the_answers_on_record(run: Path) -> None:
    for name, kept in ((LEDGER_FILE, -2), (LOG_FILE, -2)):
        lines = (run / name).read_bytes().splitlines(keepends=True)
        (run / name).write_bytes(b"".join(lines[:kept]))
    found = audit_local(run)
    assert len(found.differences) == 1, found.differences
    assert "its answer is on record" in found.differences[0]


def test_a_request_that_was_sent_and_cut_off_the_ledger_is_found(run: Path) -> None:
    """As after a kill with a request in flight: the log has no receipt yet, and still knows of it."""
    lines = (run / LEDGER_FILE).read_bytes().splitlines(keepends=True)
    (run / LEDGER_FILE).write_bytes(b"".join(lines[:-2]))
    logged = (run / LOG_FILE).read_bytes().splitlines(keepends=True)
    (run / LOG_FILE).write_bytes(b"".join(logged[:-1]))
    (run / ANSWERS_FILE).unlink()
    found = audit_local(run)
    assert len(found.differences) == 1, found.differences
    assert "it was sent" in found.differences[0]


def test_a_damaged_ledger_spends_nothing_more(run: Path) -> None:
    file = run / LEDGER_FILE
    file.write_bytes(file.read_bytes().replace(b'"amount":1000', b'"amount":9000'))
    with pytest.raises(ConfigError, match="not what its hash was made of"), opened(run, None):
        pass


def test_a_log_that_a_kill_left_behind_is_settled_by_the_ledger(run: Path) -> None:
    """The ledger is written before the log: the log's last line may be missing, or both of a request."""
    logged = (run / LOG_FILE).read_bytes().splitlines(keepends=True)
    (run / LOG_FILE).write_bytes(b"".join(logged[:-1]))
    assert audit_local(run).equal
    with opened(run, None) as oracle:
        assert oracle.log.total == 12
        # Its answer was recorded before it was paid for: it is not bought again.
        oracle.query(digits(4, 2), purpose="train", label="train/2")
        assert oracle.budget().spent == 12
    assert QueryLog.read(run / LOG_FILE).charged == {"train": 12}
    assert audit_local(run).equal


def test_the_key_may_be_elsewhere(tmp_path: Path) -> None:
    run, kept = tmp_path / "run", tmp_path / "safe.key"
    run.mkdir()
    for _ in range(2):
        with ForeignSource(ENDPOINT, budget=10, key_file=kept).open(run, "run") as oracle:
            oracle.query(digits(2), purpose="train", label="train/0")
    assert not (run / KEY_FILE).exists()
    assert kept.stat().st_mode & 0o77 == 0
    assert (run / PIN_FILE).exists()
    assert audit_local(run).equal
