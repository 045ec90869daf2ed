"""What the container files promise, checked without building an image. docs/containers.md has the real run."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from defender_client import demo

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PROGRAMS = {"oracle": "oracle_server", "defender": "defender_client"}
EXTRAS = {"oracle": "server", "defender": "client"}


def stages() -> dict[str, list[str]]:
    """The Dockerfile's instructions by stage, continuation lines joined; FROM first."""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, list[str]] = {}
    for line in filter(None, text.replace("\\\n", " ").splitlines()):
        if line.startswith("FROM "):
            found[line.split(" AS ")[1]] = current = []
        current.append(line)
    return found


def copied(instructions: list[str]) -> set[str]:
    """Sources that a stage copies from the checkout."""
    words = [line.split()[1:-1] for line in instructions if line.startswith("COPY ") and "--from=" not in line]
    return {word.split("/")[0] if "/" not in word else word for sources in words for word in sources}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML to read docker-compose.yml")
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("image", PROGRAMS)
def test_an_image_holds_its_own_program_and_no_other(image: str) -> None:
    own, other = PROGRAMS[image], ({*PROGRAMS.values()} - {PROGRAMS[image]}).pop()
    below = stages()["common"] + stages()["requirements"]
    assert stages()[image][0] == f"FROM common AS {image}"
    assert copied(stages()[image]) >= {"shared", own}
    assert not {word for word in copied(stages()[image]) | copied(below) if other in word or word in {".", ""}}
    assert copied(below) <= {"docker/requirements.py", "pyproject.toml", "constraints.txt"}


@pytest.mark.parametrize("image", PROGRAMS)
def test_an_image_runs_as_a_user_without_rights(image: str) -> None:
    users = [line.removeprefix("USER ") for line in stages()[image] if line.startswith("USER ")]
    assert users == [image]
    assert f"--uid {10001 if image == 'oracle' else 10002}" in " ".join(stages()["common"])


@pytest.mark.parametrize("image", PROGRAMS)
def test_a_change_of_code_installs_nothing_again(image: str) -> None:
    instructions = stages()[image]
    code = next(i for i, line in enumerate(instructions) if line.startswith("COPY shared"))
    assert not any("pip install" in line for line in instructions[code:])
    assert any(f"/requirements/{EXTRAS[image]}.txt" in line for line in instructions[:code])


def test_only_the_oracle_s_health_is_asked_for() -> None:
    health = [line for line in stages()["oracle"] if line.startswith("HEALTHCHECK")]
    assert len(health) == 1
    assert "/v2/health/ready" in health[0]
    assert not any(line.startswith("HEALTHCHECK") for line in stages()["defender"])


def test_no_index_is_named() -> None:
    for path in (*DOCKER.iterdir(), ROOT / "docker-compose.yml"):
        if path.is_file():
            assert not re.search(
                r"--(extra-)?index[-]url|--find-links|--trusted-host", path.read_text(encoding="utf-8")
            )


def test_the_requirements_are_pyproject_s(tmp_path: Path) -> None:
    command = [sys.executable, str(DOCKER / "requirements.py"), str(ROOT / "pyproject.toml"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=60)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    written = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in tmp_path.iterdir()}
    extras = project["optional-dependencies"]
    server = [*extras["server"], *extras["postgres"], *extras["onnxruntime"]]
    assert written == {"common": project["dependencies"], "server": server, "client": extras["client"]}


def test_the_builder_is_sent_only_what_images_are_made_of() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    sent = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert sent == {word.split("/")[0] for stage in stages().values() for word in copied(stage)}


def test_the_entrypoint_adds_its_client_once(tmp_path: Path) -> None:
    key = tmp_path / "keys" / "demo.key"
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(DOCKER), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "ORACLE_LEDGER": str(tmp_path / "ledger.db"),
        "CLIENT_NAME": "demo",
        "CLIENT_BUDGET": "1234",
        "CLIENT_KEY_FILE": str(key),
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(DOCKER / "oracle-entrypoint"), *command],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("serve", "--help")
    first = key.read_text()
    assert stat.S_IMODE(key.stat().st_mode) == 0o640  # for the group that both users are of
    run("serve", "--help")
    assert key.read_text() == first
    (client,) = json.loads(run("clients", "list", "--json"))
    assert (client["name"], client["budget"]) == ("demo", 1234)


def test_scripts_can_be_run() -> None:
    for name in ("oracle-server", "oracle-entrypoint", "defender-client"):
        assert os.access(DOCKER / name, os.X_OK), name


def test_compose_does_the_demo_s_job(compose: dict[str, Any]) -> None:
    oracle, defender = compose["services"]["oracle"], compose["services"]["defender"]
    assert defender["command"] == ["demo", "--out", "/runs/demo"]
    assert defender["depends_on"]["oracle"]["condition"] == "service_healthy"
    assert oracle["environment"]["CLIENT_BUDGET"] == f"${{DEMO_BUDGET:-{demo.BUDGET}}}"
    assert oracle["environment"]["CLIENT_KEY_FILE"] == defender["environment"]["ORACLE_API_KEY_FILE"]
    assert "restart" not in defender  # its exit code is the job's


def test_compose_keeps_what_must_be_kept(compose: dict[str, Any]) -> None:
    services = compose["services"]
    mounts = {name: services[name]["volumes"] for name in PROGRAMS}
    assert mounts == {"oracle": ["ledger:/ledger", "keys:/keys"], "defender": ["runs:/runs", "keys:/keys:ro"]}
    assert {"ledger", "keys", "runs"} <= compose["volumes"].keys()


@pytest.mark.parametrize("service", PROGRAMS)
def test_compose_gives_no_rights_that_are_not_needed(compose: dict[str, Any], service: str) -> None:
    described = compose["services"][service]
    assert described["init"] is True
    assert described["read_only"] is True
    assert described["cap_drop"] == ["ALL"]
    assert described["security_opt"] == ["no-new-privileges:true"]
    assert described["build"]["target"] == service


def test_compose_publishes_on_loopback_only(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name


def test_the_oracle_has_time_to_drain(compose: dict[str, Any]) -> None:
    oracle = compose["services"]["oracle"]
    drain = float(oracle["command"][oracle["command"].index("--drain-timeout") + 1])
    assert float(oracle["stop_grace_period"].removesuffix("s")) > 2 * drain


def test_monitoring_is_asked_for_and_its_files_are_there(compose: dict[str, Any]) -> None:
    for name in ("prometheus", "grafana"):
        service = compose["services"][name]
        assert service["profiles"] == ["monitoring"]
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in compose["volumes"]
    board = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "monitoring" / "grafana" / "dashboards" / Path(board).name).is_file()


def test_compose_accepts_the_file() -> None:
    commands = (["docker", "compose"], ["docker-compose"])
    for command in commands:
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            config = [*command, "-f", str(ROOT / "docker-compose.yml"), "--profile", "monitoring", "config", "--quiet"]
            done = subprocess.run(config, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            return
    pytest.skip("needs docker compose or docker-compose")
