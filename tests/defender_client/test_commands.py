"""What stands around the commands: help and completion that are quick, and a page that says what is so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from defender_client import exits
from defender_client.checkpoints import CheckpointError
from defender_client.cli import app
from defender_client.config import ConfigError
from defender_client.demo import DemoFailed
from defender_client.plan import PlanUnaffordable
from defender_client.preset_files import described_presets
from defender_client.ranks import RankLost
from oracle_server.settings import Settings
from shared.wire.errors import BudgetExhausted, NotFound

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
HEAVY = ("torch", "torchvision", "scipy", "matplotlib", "httpx")
_COMPLETE = """
import os, sys
words = "defender-client plan zo-ae-ds-r"
os.environ |= {"_DEFENDER_CLIENT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "2"}
from defender_client.cli import app
try:
    app(prog_name="defender-client")
finally:
    print("loaded:", *sorted(name for name in %r if name in sys.modules))
"""


def test_a_shell_completes_presets_without_loading_torch() -> None:
    done = subprocess.run([sys.executable, "-c", _COMPLETE % (HEAVY,)], capture_output=True, text=True, check=False)
    *offered, loaded = done.stdout.split("\n")[:-1]
    assert {"zo-ae-ds-rge-q20", "zo-ae-ds-rge-q100", "zo-ae-ds-rge-q192"} == set(offered)
    assert loaded.strip() == "loaded:"


def test_presets_as_json() -> None:
    answer = json.loads(CliRunner().invoke(app, ["presets", "--json"]).stdout)
    assert answer == described_presets()
    assert "zo-ae-ds" in answer


def test_every_command_says_what_it_is_for_and_how_it_may_look() -> None:
    listed = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    names = re.findall(r"^│ ([a-z]+) +[A-Z]", listed, flags=re.MULTILINE)
    assert {"plan", "train", "certify", "audit", "attack", "export"} <= set(names)
    for name in set(names) - {"presets", "demo"}:
        told = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
        assert told.exit_code == 0
        # An example, or where the result goes on to.
        assert re.search(r"(defender-client|oracle-server) [a-z]+ ", told.stdout.rsplit("╯", 1)[1]), name


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DemoFailed("no"), 1),
        (ConfigError("no"), 2),
        (CheckpointError("no"), 2),
        (FileNotFoundError("no"), 2),
        (PlanUnaffordable(2, 1, "this run"), 3),
        (BudgetExhausted("no"), 3),
        (NotFound("no"), 4),
        (RankLost("no"), 5),
    ],
)
def test_exit_codes_are_as_documented(error: Exception, code: int) -> None:
    found = exits.exit_of(error)
    assert found is not None
    assert found[0] == code
    assert re.search(rf"^\| {code} \|", PAGE, flags=re.MULTILINE)


def test_what_nobody_foresaw_has_no_exit_code_of_ours() -> None:
    assert exits.exit_of(RuntimeError("unforeseen")) is None


def test_the_page_names_every_variable_of_the_client() -> None:
    sources = "".join(
        path.read_text(encoding="utf-8") for path in (Path(__file__).parents[2] / "defender_client").glob("*.py")
    )
    variables = set(re.findall(r'"((?:ORACLE|LOCAL_LEDGER)_[A-Z_]+)"', sources))
    assert {"ORACLE_URL", "ORACLE_API_KEY", "ORACLE_CA_FILE"} <= variables
    assert not [name for name in variables if f"`{name}`" not in PAGE]


def test_every_setting_of_the_server_is_an_option_and_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    from oracle_server.cli import app as server

    told = CliRunner().invoke(server, ["serve", "--help"], env={"COLUMNS": "200"}).stdout
    for name in Settings.model_fields:
        option = "--metrics" if name == "metrics_access" else f"--{name.replace('_', '-')}"
        assert re.search(rf"{option}\b", told), option
    assert "[default: 127.0.0.1]" in told  # and is no markup, which would vanish
    of_a_key = CliRunner().invoke(server, ["ledger", "verify", "--help"], env={"COLUMNS": "200"}).stdout
    assert "[default: the signing key's own]" in of_a_key
    monkeypatch.setenv("ORACLE_MAX_BATCH_ROWS", "77")
    assert Settings().max_batch_rows == 77
