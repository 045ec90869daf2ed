"""A run's directory: its lock and its identity."""

from __future__ import annotations

from pathlib import Path

import pytest
from defender_support import command, wait_until, write_tiny

from defender_client.config import ConfigError
from defender_client.run_directory import locked


def test_the_identity_stays_for_life_and_is_its_own(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b") as first:
        assert len(first) >= 16
    with locked(tmp_path / "a" / "b") as again, locked(tmp_path / "c") as other:
        assert again == first
        assert other != first


def test_one_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):  # and it is free again
        pass


def test_a_kill_frees_the_lock(tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = ("--set", "pretrain.autoencoder_epochs=100000")
    with command("defender_client", "pretrain", write_tiny(tmp_path), "--out", run, *long, output=tmp_path / "log"):
        wait_until((run / "pretrain-autoencoder.safetensors").exists)
        with pytest.raises(ConfigError, match="another process"), locked(run):
            pass
    with locked(run):
        pass
