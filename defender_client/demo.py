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
from defender_client import stack as stacks
from defender_client.audit import Audit, audit
from defender_client.data import check_fit, load_splits, load_test
from defender_client.oracle_client import RemoteOracle
from defender_client.plan import plan
from defender_client.progress import console
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.report import RADII, report
from defender_client.run_directory import locked
from defender_client.train import STACK_FILE, train

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


def demo(out: Path, oracle_url: str | None, api_key: str | None) -> DemoResult:
    """Run the demo in `out`; what is done there already is not done or paid again.

    Args:
        out: directory for the oracle's ledger, two runs (`undefended`, `defended`) and the report.
        oracle_url: an oracle that hides a digits classifier; None starts one.
        api_key: the key for `oracle_url`.

    Raises:
        DemoFailed: the audit is not equal, or the defended stack certifies no more than the undefended one.
    """
    out.mkdir(parents=True, exist_ok=True)
    if oracle_url is not None:
        return _story(out, oracle_url, api_key)
    with _own_oracle(out) as (url, key):
        return _story(out, url, key)


def _story(out: Path, url: str, api_key: str | None) -> DemoResult:
    seen: dict[str, list[certify.Row]] = {}
    # Both runs certify with the same seed, and so under the same noise.
    for name, preset in (("undefended", "standard"), ("defended", "demo")):
        seen[name] = _run(preset, out / name, url, api_key)
    runs = [out / "undefended", out / "defended"]
    with RemoteOracle(url, api_key) as oracle:
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


def _run(preset: str, run: Path, url: str, api_key: str | None) -> list[certify.Row]:
    """Train (if the preset trains) and certify one stack, with the demo's data, noise and certification settings."""
    settings = configs.load_preset("demo")
    config = configs.load_preset(preset).model_copy(
        update={"data": settings.data, "sigma": settings.sigma, "certify": settings.certify}
    )
    splits, test = load_splits(config.data, None, config.seed), load_test(config.data, None)
    with (
        locked(run) as run_id,
        RemoteOracle(url, api_key, log=QueryLog(run / LOG_FILE), run_id=run_id) as oracle,
    ):
        check_fit(splits.train, oracle.info.image_shape)
        configs.save(config, run)
        spec = stacks.specify(config, oracle.info.image_shape, oracle.info.classes)
        planned = plan(config, spec, run, (len(splits.train), len(splits.validation), len(test)), oracle)
        console.print(f"{run.name}: {planned.total:,} queries to spend, {planned.remaining:,} left")
        planned.check_training()
        train(config, spec, run, splits, oracle)
        configs.save_certify_settings(config.certify, run)
        stack = stacks.load(run / STACK_FILE)
        return certify.certify(stack, oracle, test, config.certify, config.seed, run / certify.CERTIFIED_FILE)


@contextmanager
def _own_oracle(out: Path) -> Iterator[tuple[str, str]]:
    """An oracle on a free loopback port with a budget for this demo; stopped at the end. Yields its URL and a key."""
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
            [str(server), "serve", "--model", "digits-cnn", "--port", "0", "--ledger", ledger],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            url = _address(process, log_path)
            console.print(f"oracle on {url}, its log in {log_path}")
            yield url, key_file.read_text(encoding="utf-8").strip()
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
