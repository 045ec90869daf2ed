"""The walkthrough in `docs/` runs from its first cell to its last, and leaves no server behind."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import psutil
import pytest
import torch

WALKTHROUGH = Path(__file__).parents[2] / "docs" / "walkthrough.py"


@pytest.mark.slow
def test_the_walkthrough_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for needed in ("art", "onnxruntime", "onnx"):
        pytest.importorskip(needed)
    monkeypatch.setenv("PYTHONPATH", str(WALKTHROUGH.parents[1]))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {child.pid for child in psutil.Process().children()}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # other people's code warns of what it does itself
        found = runpy.run_path(str(WALKTHROUGH))
    said = capfd.readouterr().out
    assert found["accuracy"] > 0.9
    assert found["asked"].queries > 0
    assert found["trained"].spent == found["manifest"].total_queries
    assert "refused, and nothing charged beyond" in said
    assert (found["adversarial"] - found["images"][:4]).abs().sum() > 0
    assert {child.pid for child in psutil.Process().children()} <= before
