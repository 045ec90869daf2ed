"""`make demo` as a newcomer runs it: two processes, the exit code, the report, the audit."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

# Far more than either takes: a bound against hanging, not a measurement.
WHOLE, RESUMED = 850.0, 300.0


def run_demo(out: Path, timeout: float = WHOLE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "defender_client", "demo", "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def charged(ledger: Path) -> int:
    with sqlite3.connect(ledger) as database:
        return int(database.execute("select sum(rows) from entries where kind = 'charge'").fetchone()[0])


@pytest.mark.timeout(1200)
def test_the_demo_defends_audits_reports_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = run_demo(out)
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
    again = run_demo(out, RESUMED)
    assert again.returncode == 0, again.stdout + again.stderr
    assert charged(out / "ledger.db") == spent
    assert re.findall(r"0\.\d\d +[\d.]+ +[\d.]+", again.stdout) == re.findall(r"0\.\d\d +[\d.]+ +[\d.]+", done.stdout)

    # A charge that is one query more than the client's books know: the demo must not call that equal.
    with sqlite3.connect(out / "ledger.db") as database:
        last = database.execute("select max(seq) from entries where kind = 'charge'").fetchone()[0]
        database.execute("update entries set rows = rows + 1 where seq = ?", (last,))
    tampered = run_demo(out, RESUMED)
    assert tampered.returncode == 1
    assert f"ledger says {spent + 1:,}" in " ".join(tampered.stderr.split())
