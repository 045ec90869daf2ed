"""Who imports whom: oracle_server -> shared <- defender_client, never across, and the wire is light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Imports every module of the package named first (but `__main__`, which runs), then says which others came along.
PROBE = """
import importlib, pkgutil, sys
package, *unwanted = sys.argv[1:]
root = importlib.import_module(package)
def fail(name): raise
names = [m.name for m in pkgutil.walk_packages(root.__path__, package + ".", fail) if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(len(names), *sorted(n for n in sys.modules if n.partition(".")[0] in unwanted))
"""


def imported_along(package: str, *unwanted: str) -> list[str]:
    """Modules of `unwanted` packages in a fresh interpreter after importing all of `package`."""
    command = [sys.executable, "-c", PROBE, package, *unwanted]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    count, *found = done.stdout.split()
    assert int(count) > 0, f"{package} has no modules"
    return found


@pytest.mark.parametrize(
    ("package", "unwanted"),
    [
        ("defender_client", ["oracle_server"]),
        ("oracle_server", ["defender_client"]),
        ("shared", ["oracle_server", "defender_client"]),
        ("shared.wire", ["torch", "torchvision", "httpx", "fastapi", "starlette", "uvicorn", "sqlalchemy", "sklearn"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_importing_brings_nothing_from_across(package: str, unwanted: list[str]) -> None:
    assert imported_along(package, *unwanted) == []


def test_the_probe_sees() -> None:
    assert "shared.wire.codec" in imported_along("shared.wire", "shared")


def test_import_linter_s_contracts() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
