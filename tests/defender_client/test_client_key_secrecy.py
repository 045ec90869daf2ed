"""The defender's key stays in its environment: not in the run, the log, the report or a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from defender_support import write_tiny
from oracle_support import Caller, Running
from typer.testing import CliRunner

from defender_client import plan as plans
from defender_client.cli import app

SMALL = ("data.train_images=16", "data.validation_images=8", "train.epochs=1", "train.batch=8", "pretrain.batch=16")
# A failure that nobody foresaw, with the key in the frames below it.
CRASH = """
import sys
from defender_client import cli, oracle_client
def fail(self, *_, **__): raise RuntimeError("unforeseen")
oracle_client.RemoteOracle._get = fail
cli.app(sys.argv[1:])
"""


def test_a_run_keeps_no_key(
    server: Running, caller: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setattr(plans, "_TRIAL_SECONDS", 0.01)
    preset, out, to = write_tiny(tmp_path), tmp_path / "run", ("--oracle", server.url)
    changes = [argument for change in SMALL for argument in ("--set", change)]
    said = []
    for arguments in (
        ("plan", str(preset), *to, "--out", str(out), *changes),
        ("train", str(preset), *to, "--out", str(out), *changes),
        ("certify", "--run", str(out), *to, "--images", "2"),
        ("report", str(out)),
        ("audit", str(out), *to),
        ("audit", str(out), *to, "--json"),
    ):
        done = CliRunner().invoke(app, arguments, env={"ORACLE_API_KEY": caller.key})
        assert done.exit_code == 0, done.output
        said.append(done.output)
    secret = caller.key.split("_", 2)[2]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"queries.jsonl", "report.html"} <= {file.name for file in files}
    assert not [file for file in files if secret.encode() in file.read_bytes()]
    assert "httpcore" in caplog.text or "httpx" in caplog.text  # the libraries did talk
    assert secret not in caplog.text
    assert not any(secret in text for text in said)


def test_a_traceback_shows_no_key(server: Running, caller: Caller, tmp_path: Path) -> None:
    arguments = ("plan", str(write_tiny(tmp_path)), "--oracle", server.url)
    done = subprocess.run(
        [sys.executable, "-c", CRASH, *arguments],
        env={"ORACLE_API_KEY": caller.key, "PATH": "", "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "unforeseen" in done.stderr
    assert "Traceback" in done.stderr
    assert caller.key.split("_", 2)[2] not in done.stderr + done.stdout


@pytest.mark.parametrize("url", ["http://user:{key}@127.0.0.1:9", "http://127.0.0.1:9/?api_key={key}"])
def test_a_key_is_not_to_be_written_into_the_address(caller: Caller, url: str, tmp_path: Path) -> None:
    arguments = ("plan", str(write_tiny(tmp_path)), "--oracle", url.format(key=caller.key))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 4
    assert caller.key.split("_", 2)[2] not in done.output
