"""The whole story on the embedded digits: a hidden classifier, a defence learnt from its answers, two certificates.

Starts an oracle as another process (the two programs meet only on the wire), unless one is given.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from defender_client import certify
from defender_client import config as configs
from defender_client.audit import Audit, audit
from defender_client.jobs import train_and_certify_job
from defender_client.plan import Plan
from defender_client.progress import console
from defender_client.report import RADII, report
from defender_client.sources import LiveOracle

CLIENT_NAME = "demo"
BUDGET = 3_000_000
# "Clearly more": the difference of two proportions over some hundred images must not be luck.
CLEARLY = 0.10
_START_SECONDS = 120.0
_STOP_SECONDS = 60.0


class DemoFailed(Exception):
    """The demo did not show what it is there to show; the message says what."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo found: certified accuracies (undefended, defended) by radius, the audit, the report's path."""

    accuracies: dict[float, tuple[float, float]]
    audit: Audit
    report: Path


def demo(out: Path, oracle: LiveOracle | None) -> DemoResult:
    """Run the demo in `out`; what is done there already is not done or paid again.

    Args:
        out: directory for the oracle's ledger, two runs (`undefended`, `defended`) and the report.
        oracle: an oracle that hides a digits classifier; None starts one.

    Raises:
        DemoFailed: the audit is not equal, or the defended stack certifies no more than the undefended one.
    """
    out.mkdir(parents=True, exist_ok=True)
    if oracle is not None:
        return _story(out, oracle)
    with _own_oracle(out) as own:
        return _story(out, own)


def _story(out: Path, source: LiveOracle) -> DemoResult:
    seen: dict[str, list[certify.Row]] = {}
    # Both runs certify with the same seed, and so under the same noise.
    for name, preset in (("undefended", "standard"), ("defended", "demo")):
        seen[name] = _run(preset, out / name, source)
    runs = [out / "undefended", out / "defended"]
    with source.connect() as oracle:
        audited = audit(runs, oracle)
    target = out / "report.html"
    report(runs, target, None)
    accuracies = {
        radius: (
            certify.certified_accuracy(seen["undefended"], radius),
            certify.certified_accuracy(seen["defended"], radius),
        )
        for radius in RADII
    }
    if not audited.equal:
        raise DemoFailed(f"the accounts differ: {'; '.join(audited.differences)}")
    gain = max(defended - undefended for undefended, defended in accuracies.values())
    if gain < CLEARLY:
        raise DemoFailed(f"the defended stack certifies at most {gain:.3f} more than the undefended one: see {target}")
    return DemoResult(accuracies, audited, target)


def _run(preset: str, run: Path, source: LiveOracle) -> list[certify.Row]:
    """Train (if the preset trains) and certify one stack, with the demo's data, noise and certification settings."""
    settings = configs.load_preset("demo")
    config = configs.load_preset(preset).model_copy(
        update={"data": settings.data, "sigma": settings.sigma, "certify": settings.certify}
    )

    def announce(planned: Plan) -> None:
        left = "no budget" if planned.remaining is None else f"{planned.remaining:,} left"
        console.print(f"{run.name}: {planned.total:,} queries to spend, {left}")

    return train_and_certify_job(config, run, None, source, announce).rows


@contextmanager
def _own_oracle(out: Path) -> Iterator[LiveOracle]:
    """An oracle on a free loopback port with a budget for this demo; stopped at the end."""
    server = Path(sys.executable).with_name("oracle-server")
    if not server.exists():
        raise DemoFailed("oracle-server is not installed beside this program: name a running oracle by --oracle")
    ledger, key_file = f"sqlite:///{out / 'ledger.db'}", out / "demo.key"
    add = ["clients", "add", CLIENT_NAME, "--budget", str(BUDGET), "--ledger", ledger]
    added = subprocess.run(  # noqa: S603  (our own program)
        [str(server), *add, "--key-file", str(key_file), "--exist-ok"], capture_output=True, text=True, check=False
    )
    if added.returncode:
        raise DemoFailed(f"no client could be added to the ledger: {added.stderr.strip()}")
    log_path = out / "oracle.log"
    with log_path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603
            [str(server), "serve", "--model", "digits-cnn", "--port", "0", "--ledger", ledger, "--allow-decoders"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            url = _address(process, log_path)
            console.print(f"oracle on {url}, its log in {log_path}")
            yield LiveOracle(url, key_file.read_text(encoding="utf-8").strip())
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[bytes], log_path: Path) -> str:
    """The address the server says it listens on."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        said = re.search(r"listening on (http://\S+)", log_path.read_text(encoding="utf-8"))
        if said:
            return said.group(1)
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise DemoFailed(f"the oracle did not start; its log is {log_path}")
