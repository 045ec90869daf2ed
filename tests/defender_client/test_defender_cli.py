"""`defender-client` as its user meets it: the whole way, exit codes, one line an error."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from defender_support import PIXELS, Interfering, Trained, command, same_tensors, spent, wait_until, write_tiny
from oracle_support import Caller, Running, pay
from typer.testing import CliRunner, Result

from defender_client import plan as plans
from defender_client.certify import CERTIFIED_FILE, certified_accuracy, read
from defender_client.cli import app
from defender_client.config import preset_names
from defender_client.oracle_client import RemoteOracle
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.run_directory import locked
from defender_client.train import STACK_FILE
from shared.version import VERSION

COMMANDS = ("presets", "plan", "pretrain", "train", "certify", "report", "audit", "demo", "attack")
SMALL = ("data.train_images=16", "data.validation_images=8", "train.epochs=1", "train.batch=8", "pretrain.batch=16")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ORACLE_API_KEY", "ORACLE_API_KEY_FILE", "ORACLE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "_TRIAL_SECONDS", 0.01)


def run(*arguments: str | Path, key: str | None = None, code: int = 0, **environment: str) -> Result:
    """Run a command; whatever the exit code, there must be no traceback."""
    if key is not None:
        environment["ORACLE_API_KEY"] = key
    result = CliRunner().invoke(app, [str(a) for a in arguments], env=environment)
    assert result.exit_code == code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert key is None or key not in result.output
    return result


def refused(*arguments: str | Path, code: int, **options: Any) -> str:
    """The one line on stderr that a refusal is."""
    result = run(*arguments, code=code, **options)
    (line,) = result.stderr.strip().splitlines()
    return line


def settings(*changes: str) -> list[str]:
    return [argument for change in changes for argument in ("--set", change)]


def test_the_whole_way(server: Running, caller: Caller, tmp_path: Path) -> None:
    preset, out = write_tiny(tmp_path), tmp_path / "run"
    to = ("--oracle", server.url)
    chosen = ("--out", out, *settings(*SMALL))
    plan = json.loads(run("plan", preset, *to, *chosen, "--json", key=caller.key).stdout)
    parts = ("noise", "labels", "training", "validation", "certification")
    assert [plan[part] for part in parts] == [186, 24, 16 * 9, 8, 440]
    assert (plan["to_train"], plan["total"], plan["remaining"]) == (362, 802, 10**6)
    assert "802" in run("plan", preset, *to, *chosen, key=caller.key).stdout

    assert "zero queries" in run("pretrain", preset, *chosen).stdout
    assert spent(server, caller) == 0
    trained = run("train", preset, *to, *chosen, key=caller.key)
    assert "this run will spend 362 more queries (1,000,000 left)" in trained.stderr
    assert "362 queries spent" in " ".join(trained.stdout.split())
    assert spent(server, caller) == 362
    done = run("train", preset, *to, *chosen, "--json", key=caller.key)
    assert "will spend" not in done.stderr  # it is done
    assert json.loads(done.stdout) == {"stack": str(out / STACK_FILE), "queries": 362}

    certified = run("certify", "--run", out, *to, "--images", "2", key=caller.key)
    assert "will spend 220 more queries" in certified.stderr
    assert len(read(out / CERTIFIED_FILE)) == 2
    assert "2 images" in certified.stdout
    told = json.loads(run("certify", "--run", out, *to, "--images", "3", "--json", key=caller.key).stdout)
    assert spent(server, caller) == 362 + 330
    assert (told["images"], told["queries"], told["path"]) == (3, 330, str(out / CERTIFIED_FILE))
    rows = read(out / CERTIFIED_FILE)
    assert told["certified_accuracy"]["0.25"] == certified_accuracy(rows, 0.25)
    assert told["abstained"] == sum(row.predict == -1 for row in rows)
    assert json.loads(run("plan", preset, *to, *chosen, "--json", key=caller.key).stdout)["total"] == 0

    audited = run("audit", out, *to, key=caller.key).stdout
    assert audited.count("692") == 4
    assert "audit: equal" in audited
    answer = json.loads(run("audit", out, *to, "--json", key=caller.key).stdout)
    assert (answer["equal"], answer["logged"], answer["metrics"], answer["differences"]) == (True, 692, 692, [])

    assert json.loads(run("report", out, "--json").stdout) == {"report": str(out / "report.html")}
    assert (out / "report.html").is_file()
    run("report", out, "--out", tmp_path / "elsewhere" / "index.html")
    assert (tmp_path / "elsewhere" / "certified-accuracy.png").is_file()


def test_a_recorded_run_again_without_an_oracle(server: Running, caller: Caller, tmp_path: Path) -> None:
    preset, out, again = write_tiny(tmp_path), tmp_path / "run", tmp_path / "again"
    to = ("--oracle", server.url)
    run("train", preset, *to, "--out", out, "--record", *settings(*SMALL), key=caller.key)
    run("certify", "--run", out, *to, "--images", "2", "--record", key=caller.key)
    paid = spent(server, caller)
    # An address in the environment is for other commands.
    elsewhere = {"ORACLE_URL": "http://127.0.0.1:9"}
    trained = run("train", preset, "--replay", out, "--out", again, *settings(*SMALL), **elsewhere)
    assert f"takes 362 answers from the recording in {out}: zero queries" in trained.stderr
    assert "partial" not in trained.stderr
    assert "0 queries spent by this run" in " ".join(trained.stdout.split())
    certified = run("certify", "--run", again, "--replay", out, "--images", "2", **elsewhere)
    assert "takes 220 answers" in certified.stderr
    assert "2 images" in certified.stdout
    assert ", 0 queries, " in certified.stdout
    assert same_tensors(out / STACK_FILE, again / STACK_FILE)
    assert read(out / CERTIFIED_FILE) == read(again / CERTIFIED_FILE)
    told = run("audit", out, again, *to, key=caller.key).stdout
    assert "audit: equal" in told
    assert f"{again} was replayed: 582 answers from a recording, at zero queries" in " ".join(told.split())
    assert spent(server, caller) == paid == 582


def test_an_oracle_or_a_recording_and_not_both(server: Running, caller: Caller, tmp_path: Path) -> None:
    preset, out = write_tiny(tmp_path), tmp_path / "run"
    to = ("--oracle", server.url)
    train = ("train", preset, "--out", out, *settings(*SMALL))
    run(*train, *to, key=caller.key)
    for words in (train, ("certify", "--run", out)):
        assert "--oracle URL (or ORACLE_URL), or a recorded run by --replay" in refused(*words, code=2)
        assert "exclude each other" in refused(*words, *to, "--replay", out, code=2)
        assert "exclude each other" in refused(*words, "--record", "--replay", out, code=2)
        assert "was not recorded" in refused(*words, "--replay", out, code=2)
    # Recorded from now on, which is too late for the training.
    run("certify", "--run", out, *to, "--images", "1", "--record", key=caller.key)
    late = run("train", preset, "--out", tmp_path / "again", "--replay", out, *settings(*SMALL), code=2).stderr
    assert "that recording is partial" in late
    assert "of labels" in late.splitlines()[-1]
    (out / "answers.bin").write_bytes(b"nonsense, but longer than a prefix")
    assert "damaged at byte 0" in refused("certify", "--run", out, *to, "--record", code=2, key=caller.key)


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    assert "Usage" in run(name, "--help").stdout


def test_the_program_explains_itself(tmp_path: Path) -> None:
    text = run("--help").stdout
    assert all(name in text for name in (*COMMANDS, "ORACLE_API_KEY"))
    assert run("--version").stdout.strip() == VERSION
    listed = run("presets").stdout
    assert all(name in listed for name in preset_names())
    module = subprocess.run(
        [sys.executable, "-m", "defender_client", "--version"], capture_output=True, text=True, check=False
    )
    assert (module.returncode, module.stdout.strip(), module.stderr) == (0, VERSION, "")


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_may_come_from_a_file(server: Running, caller: Caller, tmp_path: Path) -> None:
    preset, file = write_tiny(tmp_path), tmp_path / "key"
    file.write_text(f"\n{caller.key}\n")
    arguments = ("plan", preset, "--oracle", server.url, "--json")
    run(*arguments, ORACLE_API_KEY_FILE=str(file))
    run(*arguments, ORACLE_API_KEY_FILE=str(file), ORACLE_URL="http://127.0.0.1:9")
    # The variable itself comes first, and a line's end after it does no harm.
    run(*arguments, key=caller.key, ORACLE_API_KEY_FILE=str(tmp_path / "none"))
    run(*arguments, ORACLE_API_KEY=caller.key + "\r\n")
    assert "none" in refused(*arguments, code=2, ORACLE_API_KEY_FILE=str(tmp_path / "none"))
    file.write_bytes(b"\xff\xfe")
    assert "cannot be read" in refused(*arguments, code=2, ORACLE_API_KEY_FILE=str(file))


@pytest.mark.parametrize("key", ["", "nonsense", "zo_0123456789abcdef_" + "A" * 43, "two words"])
def test_without_a_valid_key(server: Running, tmp_path: Path, key: str) -> None:
    line = refused("plan", write_tiny(tmp_path), "--oracle", server.url, code=4, key=key or None)
    assert "No valid API key" in line


# --- what cannot be used: 2 -------------------------------------------------------------------------------------------


def test_configurations_that_cannot_be_used(server: Running, caller: Caller, tmp_path: Path) -> None:
    preset, out = write_tiny(tmp_path), tmp_path / "run"
    to = ("--oracle", server.url, "--out", out)
    assert "choose one of" in refused("train", "no-such-preset", *to, code=2)
    assert "train.epoch" in refused("train", preset, *to, *settings("train.epoch=1"), code=2)
    assert "no data set" in refused("train", preset, *to, "--dataset", "nothing", code=2)
    assert "--data" in refused("train", preset, *to, "--dataset", "npz", code=2)
    assert "no such directory" in refused("train", preset, *to, "--dataset", "npz", "--data", "nowhere", code=2)
    assert "validation" in refused("train", preset, *to, *settings("data.validation_images=9999"), code=2)
    assert not (out / STACK_FILE).exists()


def test_a_run_that_was_started_otherwise(server: Running, caller: Caller, trained: Trained, tmp_path: Path) -> None:
    preset = write_tiny(tmp_path)
    to = ("--oracle", server.url, "--out", trained.run, *settings("train.epochs=3"))
    for name in ("train", "plan"):
        assert "train.epochs: 2 -> 3" in refused(name, preset, *to, code=2, key=caller.key)
    line = refused("certify", "--run", trained.run, "--oracle", server.url, "--n", "7", code=2, key=caller.key)
    assert "n: 100 -> 7" in line
    assert spent(server, caller) == 0


def test_directories_that_are_no_runs(server: Running, caller: Caller, tmp_path: Path) -> None:
    preset = write_tiny(tmp_path)
    to = ("--oracle", server.url)
    assert "not a run directory" in refused("certify", "--run", tmp_path, *to, code=2, key=caller.key)
    assert "not a run directory" in refused("report", tmp_path, code=2)
    assert "no queries.jsonl" in refused("audit", tmp_path, *to, code=2, key=caller.key)
    assert "File exists" in refused("train", preset, *to, "--out", preset, code=2, key=caller.key)
    assert "directory" in refused("report", preset, code=2)
    run("pretrain", preset, "--out", tmp_path / "run", *settings(*SMALL))
    line = refused("certify", "--run", tmp_path / "run", *to, code=2, key=caller.key)
    assert "start it with `train`" in line


def test_files_that_are_damaged(server: Running, caller: Caller, tmp_path: Path, trained: Trained) -> None:
    preset, out = write_tiny(tmp_path), tmp_path / "run"
    train = ("train", preset, "--oracle", server.url, "--out", out, *settings(*SMALL))
    run(*train, key=caller.key)
    for name, told in (("checkpoint.safetensors", "checkpoint"), (LOG_FILE, "damaged in line 1"), ("config.json", "")):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(b"nonsense\n" + whole)
        assert told in refused(*train, code=2, key=caller.key)
        (out / name).write_bytes(whole)
    (out / LOG_FILE).write_bytes(b"nonsense\n")
    assert "damaged" in refused("audit", out, "--oracle", server.url, code=2, key=caller.key)


def test_two_at_once(server: Running, caller: Caller, tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        line = refused(
            "train", write_tiny(tmp_path), "--oracle", server.url, "--out", tmp_path / "run", code=2, key=caller.key
        )
    assert "another process" in line


# --- what cannot be paid: 3 -------------------------------------------------------------------------------------------


def test_a_run_that_cannot_be_paid_is_refused_before_it_spends(server: Running, tmp_path: Path) -> None:
    preset, caller = write_tiny(tmp_path), server.caller(361)
    arguments = (preset, "--oracle", server.url, "--out", tmp_path / "run", *settings(*SMALL))
    for name in ("plan", "train"):
        result = run(name, *arguments, code=3, key=caller.key)
        line = result.stderr.strip().splitlines()[-1]
        assert "training needs 362 queries and the budget has 361 left (1 too few)" in line
        assert spent(server, caller) == 0
    plan = json.loads(run("plan", *arguments, "--json", code=3, key=caller.key).stdout)
    assert (plan["to_train"], plan["remaining"]) == (362, 361)
    server.ledger.set_budget(caller.client.name, 362)
    assert "not the certification" in run("plan", *arguments, key=caller.key).stdout
    run("train", *arguments, key=caller.key)
    certify = ("certify", "--run", tmp_path / "run", "--oracle", server.url)
    assert "certification needs 440" in run(*certify, code=3, key=caller.key).stderr
    assert not (tmp_path / "run" / CERTIFIED_FILE).exists()
    # What was not begun may still be made smaller.
    server.ledger.set_budget(caller.client.name, 362 + 15)
    run(*certify, "--images", "1", "--n0", "5", "--n", "10", key=caller.key)
    assert spent(server, caller) == 377


def test_a_budget_that_is_lowered_while_it_runs(
    server: Running, caller: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = write_tiny(tmp_path)
    out = tmp_path / "run"
    arguments = ("train", preset, "--oracle", server.url, "--out", out, *settings(*SMALL))
    run(
        "train", preset, "--oracle", server.url, "--out", tmp_path / "whole", *settings(*SMALL), key=server.caller().key
    )

    def lower(number: int) -> None:
        if number == 10:
            server.ledger.set_budget(caller.client.name, 286)

    with monkeypatch.context() as patched:
        client = httpx.Client

        def interfering(**options: Any) -> Any:
            return client(**options | {"transport": Interfering(after=lower)})

        patched.setattr(httpx, "Client", interfering)
        result = run(*arguments, code=3, key=caller.key)
    assert "budget of 286 are left" in result.stderr
    assert QueryLog.read(out / LOG_FILE).total == spent(server, caller) <= 362
    assert "budget:" in run(*arguments, code=3, key=caller.key).stderr
    server.ledger.set_budget(caller.client.name, 362)
    run(*arguments, key=caller.key)
    assert spent(server, caller) == 362
    assert same_tensors(out / STACK_FILE, tmp_path / "whole" / STACK_FILE)


# --- what the oracle refuses: 4; what differs: 1 ----------------------------------------------------------------------


@pytest.mark.parametrize("address", ["localhost:8600", "nonsense", "http://"])
def test_an_address_that_is_none_is_told_at_once(tmp_path: Path, address: str) -> None:
    line = refused("plan", write_tiny(tmp_path), "--oracle", address, code=4, key="k")
    assert "not an address" in line


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = RemoteOracle.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "retry_seconds", 0.2)
    line = refused("plan", write_tiny(tmp_path), "--oracle", "http://127.0.0.1:9", code=4, key="k")
    assert "The oracle cannot be reached" in line
    assert "is the server running" in line


def test_an_oracle_of_other_images(server: Running, caller: Caller, tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", images=np.zeros((40, 9, 9), np.uint8), labels=np.arange(40) % 10)
    arguments = ("--dataset", "npz", "--data", tmp_path, *settings("data.validation_images=4", *PIXELS))
    line = refused("plan", write_tiny(tmp_path), "--oracle", server.url, *arguments, code=2, key=caller.key)
    assert "the oracle takes images [1, 8, 8] but the data set has [1, 9, 9]" in line


def test_an_audit_that_finds_a_difference(server: Running, caller: Caller, tmp_path: Path) -> None:
    preset, out = write_tiny(tmp_path), tmp_path / "run"
    run("train", preset, "--oracle", server.url, "--out", out, *settings(*SMALL), key=caller.key)
    pay(server.ledger, caller.client.id, 7, "elsewhere", "0" * 64)
    told = run("audit", out, "--oracle", server.url, code=1, key=caller.key).stdout
    assert "NOT EQUAL" in told
    assert "elsewhere: the ledger charged 7" in " ".join(told.split())
    answer = json.loads(run("audit", out, "--oracle", server.url, "--json", code=1, key=caller.key).stdout)
    assert answer["equal"] is False
    assert answer["ledger"] - answer["logged"] == 7


# --- interrupted: 130 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_pretraining_and_certification_can_be_interrupted_too(
    server: Running, caller: Caller, trained: Trained, tmp_path: Path, number: signal.Signals
) -> None:
    out, key = tmp_path / "run", {"ORACLE_API_KEY": caller.key}
    long = settings("pretrain.autoencoder_epochs=100000")
    arguments: tuple[str | Path, ...] = ("pretrain", write_tiny(tmp_path), "--out", out, *long)
    with command("defender_client", *arguments, output=tmp_path / "pretrain.log") as working:
        wait_until((out / "pretrain-autoencoder.safetensors").exists)
        working.signal(number)
        assert working.wait() == 130, working.said
        assert "the same command resumes it" in working.said
    certified = tmp_path / "certified"
    certified.mkdir()
    for name in ("config.json", STACK_FILE):
        (certified / name).write_bytes((trained.run / name).read_bytes())
    arguments = ("certify", "--run", certified, "--oracle", server.url, "--images", "0")
    with command("defender_client", *arguments, output=tmp_path / "certify.log", environment=key) as working:
        wait_until(lambda: len(read(certified / CERTIFIED_FILE)) > 1)
        working.signal(number)
        assert working.wait() == 130, working.said
    text = (tmp_path / "pretrain.log").read_text() + (tmp_path / "certify.log").read_text()
    assert not re.search("Traceback|Error", text)
    assert len(read(certified / CERTIFIED_FILE)) < 360
