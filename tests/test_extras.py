"""Each extra brings what its program needs.

Every module of it imports without the other program's libraries, and without those that only some need.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SERVER_ONLY = ("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "sqlalchemy", "pydantic_settings")
CLIENT_ONLY = ("httpx", "jinja2", "matplotlib", "tenacity", "tensorboard", "skimage")
SOMETIMES = ("art", "foolbox", "huggingface_hub", "onnx", "onnxruntime", "psycopg", "pyautoattack", "ray", "timm")
_IMPORT_ALL = """
import importlib, pkgutil, sys
package, *absent = sys.argv[1:]

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
root = importlib.import_module(package)
names = [package, *(m.name for m in pkgutil.walk_packages(root.__path__, package + "."))]
for name in names:
    if not name.endswith(".__main__"):
        importlib.import_module(name)
print(len(names), "torchvision" in sys.modules)
"""


@pytest.mark.parametrize(
    ("package", "absent"),
    [("oracle_server", CLIENT_ONLY), ("defender_client", SERVER_ONLY), ("shared", (*SERVER_ONLY, *CLIENT_ONLY))],
)
def test_a_program_imports_with_its_own_extra_alone(package: str, absent: tuple[str, ...]) -> None:
    command = [sys.executable, "-W", "error::ImportWarning", "-c", _IMPORT_ALL, package, *absent, *SOMETIMES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    modules, torchvision = done.stdout.split()
    assert int(modules) > 5
    assert torchvision == "False"  # it takes seconds of every start, and only its own models need it


def test_every_library_that_is_kept_away_here_is_in_an_extra() -> None:
    # Else the names above would keep nothing away.
    extras = [Requirement(line) for line in requires("zo-defense") or () if "extra ==" in line]
    known = {requirement.name.lower().replace("-", "_") for requirement in extras}
    brought_by = {"starlette": "fastapi", "skimage": "scikit_image", "art": "adversarial_robustness_toolbox"}
    assert {brought_by.get(name, name) for name in (*SERVER_ONLY, *CLIENT_ONLY, *SOMETIMES)} <= known
