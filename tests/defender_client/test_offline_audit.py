"""The audit with nothing but files: an exported ledger, its public key, and the runs' own directories."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from oracle_support import Caller, Running, digits, pay, running
from typer.testing import CliRunner, Result

from defender_client.cli import app
from defender_client.config import ConfigError
from defender_client.offline_audit import LedgerAudit, audit_file
from defender_client.oracle_client import RemoteOracle
from defender_client.pinning import PIN_FILE, LedgerChanged, pin, pinned
from defender_client.query_log import LOG_FILE, QueryLog
from oracle_server.exporting import export_lines
from oracle_server.ledger import Ledger
from oracle_server.settings import Settings
from shared.audit.signatures import Receipt

BODY = "0" * 64


@dataclass(frozen=True)
class Story:
    """A server, a client, and two of its runs, of three requests each."""

    server: Running
    caller: Caller
    folder: Path
    runs: tuple[Path, Path]

    @property
    def key(self) -> bytes:
        return bytes.fromhex(self.server.ledger.identity.public_key)

    def export(self, name: str = "ledger.jsonl", client: str | None = None) -> Path:
        path = self.folder / name
        path.write_text("".join(f"{line}\n" for line in export_lines(self.server.ledger, client)))
        return path

    def audit(self, file: Path, *runs: Path, before: Path | None = None) -> LedgerAudit:
        return audit_file(file, self.key, runs, before)


def ask(server: Running, caller: Caller, run: Path, *labels: str) -> None:
    run.mkdir(exist_ok=True)
    with RemoteOracle(server.url, caller.key, log=QueryLog(run / LOG_FILE), run_id=run.name) as oracle:
        pin(run, oracle.ledger())
        for number, label in enumerate(labels, start=1):
            oracle.query(digits(number), purpose="train", label=label)


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(Settings(ledger=str(tmp_path_factory.mktemp("oracle") / "ledger.db"))) as started:
        other = started.caller(50)
        other.infer(digits(7), Idempotency_Key="another's")
        yield started


@pytest.fixture
def story(small_server: Running, tmp_path: Path) -> Story:
    caller, runs = small_server.caller(100), (tmp_path / "first", tmp_path / "second")
    for run in runs:
        ask(small_server, caller, run, "a", "b", "c")
    return Story(small_server, caller, tmp_path, runs)


def rewrite(run: Path, old: str, new: str) -> None:
    whole = (run / LOG_FILE).read_text()
    assert old in whole
    (run / LOG_FILE).write_text(whole.replace(old, new, 1))


# --- what agrees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("redacted", [False, True])
def test_a_file_and_the_runs_agree(story: Story, redacted: bool) -> None:
    name = story.caller.client.name
    result = story.audit(story.export(client=name if redacted else None), *story.runs)
    assert result.differences == ()
    assert (result.receipts, result.without_receipt, result.purposes) == (6, 0, {"train": 12})
    mine = next(client for client in result.clients if client.client == name)
    assert (mine.requests, mine.spent, mine.held, mine.budget, mine.revoked) == (6, 12, 0, 100, False)
    assert (len(result.clients) == 1, result.hidden > 0) == (redacted, redacted)


def test_a_file_alone_is_checked_and_tells_every_account(story: Story) -> None:
    result = story.audit(story.export())
    assert result.equal
    ledger = story.server.ledger
    assert {(c.client, c.spent, c.budget) for c in result.clients} == {
        (client.name, client.spent, client.budget) for client in ledger.list_clients()
    }


def test_the_key_that_the_runs_kept_will_do(story: Story) -> None:
    kept = pinned(story.runs[0])
    assert kept is not None
    assert (kept.ledger, bytes.fromhex(kept.public_key)) == (story.server.ledger.identity.ledger, story.key)
    assert audit_file(story.export(), None, story.runs).equal
    with pytest.raises(ConfigError, match="--public-key"):
        audit_file(story.export(), None)


def test_a_lost_answer_and_a_released_request_are_explained(story: Story) -> None:
    log = QueryLog(story.runs[0] / LOG_FILE)
    log.sending("first/lost", "train", 3)
    log.sending("first/released", "train", 2)
    log.close()
    pay(story.server.ledger, story.caller.client.id, 3, "first/lost", BODY)
    ledger = story.server.ledger
    ledger.release(ledger.reserve(story.caller.client.id, 2, "first/released", BODY), "no answer")
    result = story.audit(story.export(), *story.runs)
    assert (result.differences, result.purposes) == ((), {"train": 15})


# --- what does not ---------------------------------------------------------------------------------------------------


def test_a_run_that_is_not_named_is_missed(story: Story) -> None:
    differences = story.audit(story.export(), story.runs[0]).differences
    assert sum("no log here knows of it" in difference for difference in differences) == 3
    assert differences[-1] == "the client counted 6 queries, the file says 12"


def test_a_charge_that_was_made_up(story: Story) -> None:
    pay(story.server.ledger, story.caller.client.id, 5, "first/made-up", BODY)
    differences = story.audit(story.export(), *story.runs).differences
    assert "first/made-up: the ledger charged 5, and no log here knows of it" in differences


def test_a_log_that_was_changed(story: Story) -> None:
    rewrite(story.runs[0], '"charged":3', '"charged":1')
    differences = story.audit(story.export(), *story.runs).differences
    assert any("the client counted 1, the ledger 3" in difference for difference in differences)


def test_receipts_that_are_not_the_requests_own(story: Story) -> None:
    log = QueryLog.read(story.runs[0] / LOG_FILE)
    one, other = [request.receipt or "" for request in log.requests.values()][:2]
    rewrite(story.runs[0], one, other)
    assert any("its receipt is for the key" in told for told in story.audit(story.export(), *story.runs).differences)
    rewrite(story.runs[0], other, other[:-8] + "AAAAAAAA")
    assert any(
        "the signature was not made by this key" in told
        for told in story.audit(story.export(), *story.runs).differences
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rows": 9}, "for 9 queries, and 1 rows were sent"),
        ({"body_sha256": BODY}, "for another body"),
        ({"kind": "release"}, "of an entry of kind 'release'"),
    ],
)
def test_receipts_that_the_server_signed_for_something_else(story: Story, change: dict[str, object], told: str) -> None:
    """As a server might give that lies with its own key."""
    log = QueryLog.read(story.runs[0] / LOG_FILE)
    text = next(request.receipt for request in log.requests.values() if request.receipt)
    receipt = Receipt.parse(text)
    signer = story.server.ledger._signer
    assert signer is not None
    changed = type(receipt.entry)(**{**{n: getattr(receipt.entry, n) for n in receipt.entry.__slots__}, **change})
    lie = signer.sign_receipt(receipt.ledger, bytes.fromhex(receipt.previous), changed).text()
    rewrite(story.runs[0], text, lie)
    assert any(told in difference for difference in story.audit(story.export(), *story.runs).differences)


def test_an_older_export_knows_not_all_receipts(story: Story) -> None:
    older = story.export("older.jsonl")
    ask(story.server, story.caller, story.runs[0], "d")
    result = story.audit(older, *story.runs)
    assert any("the ledger was set back" in difference for difference in result.differences)
    newer = story.export("newer.jsonl")
    assert story.audit(newer, *story.runs, before=older).equal
    assert any("set back" in told for told in story.audit(older, before=newer).differences)


def test_a_history_that_the_holder_of_the_key_wrote_anew(story: Story, tmp_path: Path) -> None:
    """Another ledger under the same key and even the same id: only the receipts, and older exports, can tell."""
    (tmp_path / "anew").mkdir()
    key = Path(str(story.server.service.settings.ledger) + ".key")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secrets.token_hex", lambda _: story.server.ledger.identity.ledger)
        anew = Ledger.open(str(tmp_path / "anew" / "ledger.db"), signing_key=key)
    names = [(client.name, client.budget) for client in story.server.ledger.list_clients()]
    ids = {name: anew.add_client(name, budget)[0].id for name, budget in names}
    for run in story.runs:
        for request in QueryLog.read(run / LOG_FILE).requests.values():
            body = Receipt.parse(request.receipt or "").entry.body_sha256
            pay(anew, ids[story.caller.client.name], request.rows, request.key, body or "")
    path = tmp_path / "anew.jsonl"
    path.write_text("".join(f"{line}\n" for line in export_lines(anew)))
    anew.close()
    alone = story.audit(path)
    assert alone.equal
    result = story.audit(path, *story.runs)
    assert any("history was rewritten" in told or "was set back" in told for told in result.differences)
    assert result.receipts == 0
    before = story.audit(path, before=story.export()).differences
    assert any("rewritten" in told or "set back" in told for told in before)


def test_another_ledger_or_key_than_the_runs_began_with(story: Story) -> None:
    (story.runs[0] / PIN_FILE).write_text(json.dumps({"ledger": "00", "public_key": story.key.hex()}))
    with pytest.raises(LedgerChanged, match="audited apart"):
        story.audit(story.export(), *story.runs)
    (story.runs[1] / PIN_FILE).unlink()
    differences = story.audit(story.export(), *story.runs).differences
    assert any("charged on ledger 00" in difference for difference in differences)
    (story.runs[0] / PIN_FILE).write_text(json.dumps({"ledger": "00", "public_key": "11" * 32}))
    assert any("which is not the one given" in told for told in story.audit(story.export(), *story.runs).differences)
    (story.runs[0] / PIN_FILE).write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        story.audit(story.export(), *story.runs)


def test_a_run_does_not_go_on_with_another_ledger(story: Story, tmp_path: Path) -> None:
    with running(Settings(ledger=str(tmp_path / "other.db"))) as other:
        with pytest.raises(LedgerChanged, match="remove"):
            ask(other, other.caller(5), story.runs[0], "e")
        assert other.ledger.entries(kinds=("reserve",)) == []
    with pytest.raises(LedgerChanged, match="shows no ledger"):
        pin(story.runs[0], None)
    bare = tmp_path / "bare"
    bare.mkdir()
    pin(bare, None)
    assert pinned(bare) is None


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: object, code: int = 0) -> Result:
    environment = {name: "" for name in os.environ if name.startswith("ORACLE_")}
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)], env=environment)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_command_needs_no_server_and_no_api_key(story: Story) -> None:
    file = story.export()
    key = story.folder / "key"
    key.write_text(story.key.hex() + "\n")
    for text in (story.key.hex(), key):
        told = run(*story.runs, "--ledger", file, "--public-key", text).stdout
        assert "audit: equal" in told
        assert "6 receipts stand in the ledger; 0 requests have none" in told
    assert story.caller.client.name in run("--ledger", file, "--public-key", key).stdout
    told = json.loads(run(*story.runs, "--ledger", file, "--json").stdout)
    assert (told["equal"], told["receipts"], told["purposes"]) == (True, 6, {"train": 12})
    redacted = story.export("mine.jsonl", story.caller.client.name)
    assert "of others and left out" in run(*story.runs, "--ledger", redacted).stdout
    assert "audit: equal" in run("--ledger", file, "--ledger-before", redacted, "--public-key", key).stdout


def test_the_command_says_what_differs(story: Story) -> None:
    file = story.export()
    whole = file.read_text()
    file.write_text(whole.replace('"rows":3', '"rows":2', 1))
    told = run(*story.runs, "--ledger", file, code=1).stdout
    assert "differs: entry" in told
    assert "NOT EQUAL" in told
    file.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert "cut off" in run("--ledger", file, "--public-key", story.key.hex(), code=1).stdout
    file.write_text(whole)
    assert "another public key" in run("--ledger", file, "--public-key", "22" * 32, code=1).stdout


def test_the_command_refuses_what_it_cannot_use(story: Story, tmp_path: Path) -> None:
    file = story.export()
    assert "neither 64" in run("--ledger", file, "--public-key", "short", code=2).stderr
    assert "--public-key" in run("--ledger", file, code=2).stderr
    assert "cannot be read" in run("--ledger", tmp_path / "no", "--public-key", story.key.hex(), code=2).stderr
    assert (
        "not an exported ledger"
        in run("--ledger", story.runs[0] / LOG_FILE, "--public-key", story.key.hex(), code=2).stderr
    )
    for arguments in ((), (story.runs[0],), ("--oracle", "http://x"), (story.runs[0], "--ledger-before", file)):
        assert "--ledger" in run(*arguments, code=2).stderr
