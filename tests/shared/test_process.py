from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from shared import process
if sys.argv[1] == "kept":
    assert process.keep_memory()
np.ones(2**22)  # 32 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(2**22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(program: str, *arguments: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY" and not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_not_faulted_in_again() -> None:
    as_it_is, kept = int(run(FAULTS, "plain")), int(run(FAULTS, "kept"))
    assert kept < as_it_is / 10


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_idle_threads_sleep_unless_told_otherwise(given: dict[str, str], expected: str) -> None:
    program = "import os; from shared import process; process.prepare(); print(os.environ['OMP_WAIT_POLICY'])"
    assert run(program, **given) == expected


@pytest.mark.parametrize("package", ["oracle_server", "defender_client"])
def test_programs_prepare_before_torch_is_loaded(package: str) -> None:
    program = f"""
import sys
import {package}.__main__ as program
assert "torch" not in sys.modules
import shared.process
shared.process.prepare = lambda: print("torch" in sys.modules)
sys.argv = ["program", "--version"]
try:
    program.main()
except SystemExit:
    pass
"""
    assert run(program).splitlines()[0] == "False"
