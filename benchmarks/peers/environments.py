"""A virtual environment for each framework, so that what one pins does not change another.

Each has the framework and its own dependencies. What it does not bring (torch, numpy, safetensors, psutil) comes from
the environment this is started from, at the end of its path: torch is not installed again.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGES: Mapping[str, Sequence[str]] = {
    "fastapi": ("fastapi", "uvicorn", "httptools", "uvloop"),
    "litserve": ("litserve",),
    "mlserver": ("mlserver", "uvloop<0.22"),  # MLServer 1.7.1 takes a loop that newer ones no longer make
    "bentoml": ("bentoml",),
}


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of a framework's environment, whether or not it is there."""
    return folder / name / "bin" / "python"


def version_in(folder: Path, name: str) -> str | None:
    """The version installed there; None if the environment or the package is missing."""
    code = f"from importlib.metadata import version; print(version({name!r}))"
    try:
        asked = subprocess.run([python_of(folder, name), "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return asked.stdout.strip()


def set_up(folder: Path, name: str) -> str | None:
    """Make an environment and install a framework into it; why not, if it failed."""
    home = folder / name
    log = folder / f"{name}.log"
    folder.mkdir(parents=True, exist_ok=True)
    if version_in(folder, name) is None:
        venv.create(home, with_pip=True, clear=True)
        # Before torch is on its path: what pip finds there it would take for installed.
        install = [str(python_of(folder, name)), "-m", "pip", "install", "--quiet", *PACKAGES[name]]
        with log.open("w") as output:
            done = subprocess.run(install, stdout=output, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            errors = [line for line in log.read_text().splitlines() if line.startswith("ERROR")]
            return (errors or [f"pip ended with {done.returncode}"])[-1] + f" (see {log})"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = home / "lib" / version / "site-packages"
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return None
