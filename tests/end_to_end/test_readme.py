"""The README's own commands, run in its order against a live oracle; only sizes are made small."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shared.models.classifiers import CifarResNet

README = Path(__file__).parents[2] / "README.md"
# What makes a run at full scale fit a test.
SMALL = {
    "data.validation_images": 8,
    "pretrain.autoencoder_epochs": 1,
    "denoiser.depth": 3,
    "denoiser.width": 8,
    "estimator.q": 3,
    "train.batch": 16,
}
PROGRAMS = {"oracle-server": "oracle_server", "defender-client": "defender_client"}


def commands() -> list[list[str]]:
    """Every command of ours in the README's indented blocks, in order, without comments and placeholders resolved."""
    found = []
    for line in README.read_text(encoding="utf-8").splitlines():
        words = shlex.split(line, comments=True) if re.match(r"    (oracle-server|defender-client) ", line) else []
        if words:
            found.append(words)
    return found


def run(words: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", PROGRAMS[words[0]], *words[1:]]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=240, check=False
    )


@contextmanager
def serving(words: list[str], cwd: Path) -> Iterator[str]:
    command = [sys.executable, "-m", PROGRAMS[words[0]], *words[1:], "--port", "0"]
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        watchdog = threading.Timer(120, server.kill)
        watchdog.start()
        try:
            line = server.stdout.readline()
            watchdog.cancel()
            assert line.startswith("listening on "), "the server did not start"
            yield line.removeprefix("listening on ").strip()
        finally:
            watchdog.cancel()
            server.terminate()
            assert server.wait(60) == 0


def small(words: list[str], data: Path, url: str) -> list[str]:
    replaced = {"DIR": str(data), "http://HOST:8600": url, "1000": "400"}
    words = [replaced.get(word, word) for word in words]
    if words[1] in ("plan", "train"):
        for key, value in SMALL.items():
            words += ["--set", f"{key}={value}"]
    return words


def test_the_readme_names_commands_of_both_programs() -> None:
    verbs = {(words[0], words[1]) for words in commands()}
    assert {("oracle-server", "clients"), ("oracle-server", "serve")} <= verbs
    assert {("defender-client", verb) for verb in ("plan", "train", "certify", "report", "audit")} <= verbs


@pytest.mark.timeout(600)
def test_the_readme_commands_work_in_their_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(CifarResNet(20).state_dict(), tmp_path / "resnet20.safetensors")
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 6)):
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(data / f"{name}.npz", images=images, labels=rng.integers(0, 10, count))
    spoken = commands()
    added = run(next(words for words in spoken if words[1] == "clients"), tmp_path)
    assert added.returncode == 0, added.stderr
    key = added.stdout.strip()
    assert re.fullmatch(r"zo_\S+", key)
    with serving(next(words for words in spoken if words[1] == "serve" and "resnet20" in words[3]), tmp_path) as url:
        for words in (words for words in spoken if words[0] == "defender-client"):
            done = run(small(words, data, url), tmp_path, ORACLE_API_KEY=key)
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
            if words[1] == "audit":
                assert "audit: equal" in done.stdout
    rows = (tmp_path / "runs" / "mine" / "certified.tsv").read_text(encoding="utf-8").splitlines()
    assert rows[0].split("\t")[:6] == ["idx", "label", "predict", "radius", "correct", "time"]
    assert len(rows) == 1 + 6
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
