"""The walkthrough in `docs/` runs from its first cell to its last, and leaves no server behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

WALKTHROUGH = Path(__file__).parents[2] / "docs" / "walkthrough.py"


@pytest.mark.slow
@pytest.mark.timeout(600)  # three programs that load torch, on a machine that may be busy
def test_the_walkthrough_runs(tmp_path: Path) -> None:
    for needed in ("art", "onnxruntime", "onnx"):
        pytest.importorskip(needed)
    environment = {"PYTHONPATH": str(WALKTHROUGH.parents[1]), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(WALKTHROUGH)],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"accuracy ([\d.]+); 100 queries", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.9
    # The cells check their own accounts; what they print is that they were reached.
    reached = ["trained with", "queries; l2 norms", "|gradient|", "differ by", "an abstention)", "984 of the lifetime"]
    for said in reached:
        assert said in done.stdout, said
    assert not [found for found in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(_command(found))]


def _command(found: psutil.Process) -> list[str]:
    return found.info["cmdline"] or []
