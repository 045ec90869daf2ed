"""What replicas may be asked for, and what all of them are given. None of it needs Ray."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from oracle_server.cli import app
from oracle_server.replicas import Replicas, ReplicasError, read, read_replicas, shared_settings
from oracle_server.settings import Settings

POSTGRES = "postgresql://oracle@db/ledger"


def test_sqlite_is_for_one_replica_on_this_machine(tmp_path: Path) -> None:
    sqlite, postgres = Settings(ledger=f"{tmp_path}/ledger.db"), Settings(ledger=POSTGRES)
    Replicas().check(sqlite, one_machine=True)
    for replicas, one_machine in (
        (Replicas(replicas=2), True),
        (Replicas(max_replicas=2), True),
        (Replicas(), False),
    ):
        with pytest.raises(ReplicasError, match="postgresql://"):
            replicas.check(sqlite, one_machine=one_machine)
        replicas.check(postgres, one_machine=one_machine)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"min_replicas": 2}, "give max-replicas"),
        ({"target_ongoing_requests": 8.0}, "give max-replicas"),
        ({"replicas": 2, "max_replicas": 4}, "not both"),
        ({"min_replicas": 5, "max_replicas": 4}, "more than"),
    ],
)
def test_numbers_that_contradict_each_other(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ReplicasError, match=said):
        read_replicas(**wrong).check(Settings(ledger=POSTGRES), one_machine=True)


def test_noise_needs_a_seed_that_all_replicas_know(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    settings = Settings(ledger=POSTGRES, policy=policy)
    policy.write_text("[answers.noise]\nsigma = 0.1\n")
    Replicas().check(settings, one_machine=True)
    with pytest.raises(ReplicasError, match="seed"):
        Replicas(replicas=2).check(settings, one_machine=True)
    policy.write_text("seed = 1\n[answers.noise]\nsigma = 0.1\n")
    Replicas(replicas=2).check(settings, one_machine=True)


def test_a_vote_needs_a_seed_that_all_replicas_know(tmp_path: Path) -> None:
    voting = {"ledger": "postgresql://nobody@localhost/none", "defence": tmp_path, "smooth": 8}
    with pytest.raises(ReplicasError, match="--smooth-seed"):
        Replicas(replicas=2).check(Settings(**voting), one_machine=True)
    Replicas(replicas=2).check(Settings(**voting, smooth_seed=1), one_machine=True)
    Replicas(replicas=1).check(Settings(**voting), one_machine=True)


def test_what_ray_is_told() -> None:
    settings = Settings(max_queue_requests=100, drain_timeout=20, ledger_timeout=5)
    fixed = Replicas(replicas=3, num_cpus=2, num_gpus=0.5).deployment(settings)
    assert fixed["num_replicas"] == 3
    assert "autoscaling_config" not in fixed
    assert fixed["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0.5}
    assert fixed["max_ongoing_requests"] > settings.max_queue_requests  # else it never refuses by itself
    assert fixed["graceful_shutdown_timeout_s"] >= settings.drain_timeout
    assert fixed["health_check_timeout_s"] > settings.ledger_timeout
    scaled = Replicas(min_replicas=2, max_replicas=8, target_ongoing_requests=16).deployment(settings)
    assert "num_replicas" not in scaled
    assert scaled["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 8, "target_ongoing_requests": 16}


def test_what_is_relative_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica's working directory is another."""
    monkeypatch.chdir(tmp_path)
    given = shared_settings(Settings(policy=Path("p.toml"), ledger="sub/ledger.db"))
    assert given["policy"] == f"{tmp_path}/p.toml"
    assert given["ledger"] == f"sqlite:///{tmp_path}/sub/ledger.db"
    given = shared_settings(Settings(ledger=POSTGRES, weights="mine.safetensors"))
    assert (given["ledger"], given["signing_key"]) == (POSTGRES, f"{tmp_path}/oracle-ledger.key")
    assert given["weights"] == "mine.safetensors"  # no such file: it may be a name of torchvision's
    Path("mine.safetensors").touch()
    assert shared_settings(Settings(weights="mine.safetensors"))["weights"] == f"{tmp_path}/mine.safetensors"
    Path("mine.onnx").touch()
    assert shared_settings(Settings(model="mine.onnx"))["model"] == f"{tmp_path}/mine.onnx"
    assert shared_settings(Settings(model="resnet18"))["model"] == "resnet18"


def test_arguments_of_an_application_are_settings_and_replicas() -> None:
    settings, replicas = read({"ledger": POSTGRES, "replicas": "2", "max_batch_rows": "64"})  # as `serve run` has them
    assert (settings.ledger, settings.max_batch_rows, replicas.replicas) == (POSTGRES, 64, 2)
    with pytest.raises(ReplicasError, match="no such setting: ledgr"):
        read({"ledgr": POSTGRES})
    with pytest.raises(ReplicasError, match="max-batch-rows"):
        read({"max_batch_rows": 0})
    with pytest.raises(ReplicasError, match="replicas"):
        read({"replicas": "many"})


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*options: str) -> str:
        result = CliRunner().invoke(app, ["ray", *options])
        assert result.exit_code == 2, result.output
        assert result.stderr.count("\n") == 1
        return result.stderr

    ledger = f"sqlite:///{tmp_path}/ledger.db"
    assert "postgresql://" in told("--ledger", ledger, "--replicas", "2")
    assert "replicas: " in told("--ledger", ledger, "--replicas", "0")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'zo-defense[ray]'" in told("--ledger", ledger)
    assert not (tmp_path / "ledger.db").exists()


def test_the_command_has_the_options_of_serve_but_for_those_of_a_connection() -> None:
    def options(command: str) -> set[str]:
        words = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--help"]).output.split()
        return {word for word in words if word.startswith("--")}

    missing = options("serve") - options("ray")
    assert missing == {
        *("--max-connections", "--max-header-bytes", "--max-headers", "--header-timeout", "--share-decoders"),
        *("--tls-cert", "--tls-key", "--tls-key-password-file"),
    }
