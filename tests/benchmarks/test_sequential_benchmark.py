"""The benchmark of sequential certification as a command, with little to do."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks import sequential
from benchmarks.measuring import ROOT


@pytest.mark.parametrize("source", ["synthetic", "files", "counts"])
def test_it_prints_costs_accuracies_and_errors(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "counts").write_text("1000 1000 1\n400 1000 0\n900 1000 1\n")
    arguments = {
        "synthetic": [],
        "files": ["--from", str(ROOT / "docs" / "results" / "cifar10-cpu" / "defended.tsv")],
        "counts": ["--counts", str(tmp_path / "counts")],
    }[source]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--images", "600", "--trials", "300", *arguments])
    sequential.main()
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]
    saved = [float(row[2]) for row in rows if row[0].endswith("sequential")]
    differences = [float(cell) for row in rows if row[0].endswith("difference") for cell in row[4:] if cell]
    assert len(saved) == 2
    assert min(saved) > 1.5
    assert len(differences) == 7
    assert max(map(abs, differences)) < 2
    assert len(re.findall(r"^\| r = ", printed, re.MULTILINE)) == 4
