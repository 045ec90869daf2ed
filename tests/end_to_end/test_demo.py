"""The demo as a newcomer runs it: from an installed wheel, outside the checkout; exit code, report, audit."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Far more than either takes: a bound against hanging, not a measurement.
WHOLE, RESUMED = 850.0, 300.0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    # A copy: what a build leaves behind must not stay in the checkout, nor what an earlier one left come along.
    for name in ("pyproject.toml", "README.md", "LICENSE", "shared", "oracle_server", "defender_client"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the wheel's programs, in an environment that has its dependencies from this one."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False)
    programs = home / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", str(wheel)], check=True)
    packages = next(home.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def run_demo(programs: Path, out: Path, timeout: float = WHOLE) -> subprocess.CompletedProcess[str]:
    command = [str(programs / "defender-client"), "demo", "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=out.parent)


def test_the_wheel_has_what_the_programs_need_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"shared", "oracle_server", "defender_client"}
    for package in ("shared", "oracle_server", "defender_client"):
        tracked = subprocess.run(
            ["git", "ls-files", package], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout.splitlines()
        assert not set(tracked) - names, f"the wheel lacks files of {package}"
    assert not [name for name in names if "__pycache__" in name]


def charged(ledger: Path) -> int:
    with sqlite3.connect(ledger) as database:
        return int(database.execute("select sum(rows) from entries where kind = 'charge'").fetchone()[0])


@pytest.mark.timeout(1200)
def test_the_demo_defends_audits_reports_and_resumes(programs: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = run_demo(programs, out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "audit: equal" in done.stdout
    rows = {m[1]: (float(m[2]), float(m[3])) for m in re.finditer(r"(0\.\d\d) +([\d.]+) +([\d.]+)", done.stdout)}
    assert set(rows) == {"0.00", "0.25", "0.50", "0.75"}
    undefended, defended = rows["0.25"]
    assert defended > undefended + 0.1
    report = (out / "report.html").read_text(encoding="utf-8")
    assert f"{100 * defended:.1f} %" in report
    assert f"{100 * undefended:.1f} %" in report
    spent = charged(out / "ledger.db")
    assert f"{spent:,}" in done.stdout

    # Again: everything is there, so nothing is bought and the figures are the same.
    again = run_demo(programs, out, RESUMED)
    assert again.returncode == 0, again.stdout + again.stderr
    assert charged(out / "ledger.db") == spent
    assert re.findall(r"0\.\d\d +[\d.]+ +[\d.]+", again.stdout) == re.findall(r"0\.\d\d +[\d.]+ +[\d.]+", done.stdout)

    # A charge that is one query more than the client's books know: the demo must not call that equal.
    with sqlite3.connect(out / "ledger.db") as database:
        last = database.execute("select max(seq) from entries where kind = 'charge'").fetchone()[0]
        database.execute("update entries set rows = rows + 1 where seq = ?", (last,))
    tampered = run_demo(programs, out, RESUMED)
    assert tampered.returncode == 1
    assert f"ledger says {spent + 1:,}" in " ".join(tampered.stderr.split())
