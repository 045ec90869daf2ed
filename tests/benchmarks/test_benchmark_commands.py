"""The benchmarks as commands, with little to do: that they run, and print what they measured."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from benchmarks import http_overhead, training_step
from benchmarks.in_process import check
from benchmarks.measuring import Child, Failed, Turn, Worker, interleave, ratios, spread, table
from benchmarks.peers import __main__ as peers
from benchmarks.peers.candidates import EAGER_AS_RUN, OURS
from benchmarks.training_step import plain_gradient
from defender_client import zo
from defender_client.config import EstimatorConfig


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints. Its servers and workers are processes, as ever; itself it is this one."""

    def call(command: Callable[[], None], *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        command()
        return capsys.readouterr().out

    return call


def cells(text: str) -> dict[str, list[str]]:
    """Rows of all tables of a text by their first cell; later ones of the same name are added."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("|--"):
            name, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(name, []).extend(rest)
    return found


def number(cell: str) -> float:
    return float(cell.replace(",", "").rstrip("%"))


def test_quartiles_are_those_of_numpy() -> None:
    values = list(np.random.default_rng(0).random(11))
    found = spread(values)
    np.testing.assert_allclose([found.low, found.median, found.high], np.quantile(values, [0.25, 0.5, 0.75]))
    assert spread([2.0]).show() == "2 (2 to 2)"


def test_ratios_are_taken_within_a_round() -> None:
    assert ratios([1.0, 20.0, 300.0], [1.0, 10.0, 100.0]).median == 2.0


def test_every_candidate_has_one_turn_a_round_in_changing_order() -> None:
    turns: list[str] = []

    def candidate(name: str) -> int:
        turns.append(name)
        return len(turns)

    results = interleave(20, {name: lambda name=name: candidate(name) for name in "abc"})  # type: ignore[misc]
    rounds = ["".join(turns[start : start + 3]) for start in range(0, len(turns), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 3
    assert [len(each) for each in results.values()] == [20, 20, 20]  # and not 21: the first round warms up
    assert min(map(min, results.values())) == 4


def test_a_table_is_markdown() -> None:
    assert table(["", "n"], [["one", "1"], ["ten", "10"]]).splitlines()[1:] == [
        "|-----|---:|",
        "| one |  1 |",
        "| ten | 10 |",
    ]


def test_a_process_that_ends_says_why() -> None:
    with (
        Child([sys.executable, "-c", "raise ValueError('no such port')"]) as child,
        pytest.raises(Failed, match="ValueError: no such port"),
    ):
        child.line(30)


def test_a_process_is_ended_with_what_it_started() -> None:
    code = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with Child([sys.executable, "-c", code]) as child:
        grandchild = int(child.line(30))
    # It is init's to reap: until then it is there, and dead.
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE


def test_what_a_worker_prints_does_not_disturb_its_turns() -> None:
    code = (
        "from benchmarks.measuring import obey\n"
        "def make():\n"
        "    print('loading')\n"
        "    return lambda amount: (print('noise'), {'did': amount})[1], 'ready'\n"
        "obey(make)"
    )
    with Worker([sys.executable, "-c", code]) as worker:
        assert worker.ready() == "ready"
        assert worker.turn(3).parts == {"did": 3}


@pytest.mark.parametrize(("name", "q"), [("cge", 1), ("rge", 7)])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_the_plain_loop_estimates_what_our_estimator_does(name: str, q: int, difference: str) -> None:
    z = torch.rand(3, 5, dtype=torch.float64)

    def loss(points: torch.Tensor) -> torch.Tensor:
        return (points.pow(3) * torch.arange(1, 6)).sum(1)

    config = EstimatorConfig(name=name, q=q, mu=0.01, difference=difference)  # type: ignore[arg-type]
    plain = plain_gradient(config, loss, z, torch.Generator().manual_seed(1))
    ours = zo.make(name, q=q, mu=0.01, difference=difference, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    if name == "rge":
        # The loop draws a direction for all samples, ours all directions of a sample: ours is given the loop's.
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.randn(3, 5, generator=generator).double() for _ in range(q)]
        units = torch.stack([u / u.norm(dim=1, keepdim=True) for u in drawn], 1)
        vars(ours)["_steps"] = lambda points: 0.01 * units
    probes = ours.ask(z)
    expected = ours.tell(loss(probes.flatten(0, 1)).view(3, -1))
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)


def test_http_overhead(run: Callable[..., str]) -> None:
    small = ("--rounds", "1", "--batches", "5", "--rows", "8", "--connections", "2")
    rows = cells(run(http_overhead.main, "--model", "linear", *small))
    inside = number(rows["in process"][0])
    rate, share = number(rows["HTTP, 2 connections"][0]), number(rows["HTTP, 2 connections"][3])
    assert share / 100 == pytest.approx(rate / inside, rel=0.02, abs=0.001)


def test_training_step(run: Callable[..., str]) -> None:
    small = ("--rounds", "1", "--batch", "4", "--denoiser", "dncnn:2:4", "--cases", "rge-2")
    rows = cells(run(training_step.main, *small))
    ours, loop = rows["rge-2, ours"], rows["rge-2, loop (eager)"]
    assert number(loop[3].split()[0]) == pytest.approx(number(loop[0]) / number(ours[0]), rel=0.02)
    parts = {name: number(values[0]) for name, values in rows.items() if name and "rge-2" not in name}
    step = sum(took for name, took in parts.items() if not name.startswith(("server", "other threads")))
    assert step == pytest.approx(number(ours[0]), rel=0.1)
    for name in ("denoise and encode", "ask", "tell", "backward", "optimizer", "server: inference"):
        assert parts[name] >= 0


def test_peers_by_name_whether_they_take_part_or_not(run: Callable[..., str], tmp_path: Path) -> None:
    # FastAPI is ours, too: its environment is this one.
    python = tmp_path / "fastapi" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    chosen = ["--only", "as people", "RemoteOracle", "FastAPI, raw", "MLServer"]
    small = ("--model", "linear", "--rounds", "1", "--batches", "2", "--rows", "8")
    text = run(peers.main, "run", "--venvs", str(tmp_path), *small, *chosen)
    rows = cells(text)
    rate = {name: number(rows[name][0]) for name in (EAGER_AS_RUN, OURS, "FastAPI, raw bytes")}
    for name, each in rate.items():
        assert number(rows[name][2]) == pytest.approx(each / rate[EAGER_AS_RUN], abs=0.01)
        assert number(rows[name][3].split()[0]) == pytest.approx(rate[OURS] / each, rel=0.02, abs=0.01)
    assert re.search(r"Did not take part: MLServer, JSON: 'mlserver' is not installed in .*: see `setup`", text)


def test_a_candidate_with_wrong_logits_does_not_take_part(tmp_path: Path) -> None:
    np.save(tmp_path / "expected.npy", np.zeros((2, 10), np.float32))
    check(np.full((2, 10), 1e-5, np.float32), tmp_path / "expected.npy")
    with pytest.raises(SystemExit, match=r"wrong by up to 0\.1"):
        check(np.full((2, 10), 0.1, np.float32), tmp_path / "expected.npy")
    with pytest.raises(SystemExit, match="wrong"):
        check(np.full((2, 10), np.nan, np.float32), tmp_path / "expected.npy")


def test_reports_of_several_rounds() -> None:
    turns = {EAGER_AS_RUN: [Turn(2.0, 2.0), Turn(4.0, 2.0)], OURS: [Turn(1.0, 0.1, {"server CPU": 1.0})] * 2}
    rows = cells(peers.report(turns, 100, 1))
    assert rows[EAGER_AS_RUN] == ["38", "31 to 44", "1.00", "3.00 (2.50 to 3.50)", "2000"]
    assert rows[OURS] == ["100", "100 to 100", "3.00", "1.00 (1.00 to 1.00)", "100 + 1000"]
    steps = {"rge-2, ours": [Turn(1.0, 1.0, {"ask": 0.5})], "rge-2, loop (eager)": [Turn(3.0, 1.0)]}
    rows = cells(training_step.report(steps, 10))
    assert rows["rge-2, loop (eager)"] == ["300.0", "300.0 to 300.0", "3.3", "3.00 (3.00 to 3.00)"]
    assert rows["ask"] == ["50.00"]
