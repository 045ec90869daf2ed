"""The command: `python -m benchmarks.faults --faults 2000 --seed 0 --ledger sqlite --out faults.txt`."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.campaign import Done, Plan, run
from benchmarks.faults.judge import Evidence, Verdict, judge, read_lines
from benchmarks.faults.servers import forkserver
from benchmarks.faults.stores import Store, open_store
from benchmarks.faults.work import audit


def main() -> None:
    """Run a campaign and print what came of it; exit code 1 where anything is wrong."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # whatever was started is ended, and the disk unmounted
    folder = Path(tempfile.mkdtemp(prefix="zo-faults-"))
    print(f"seed {options.seed}, {options.ledger}, evidence in {folder}", file=sys.stderr, flush=True)
    forkserver()
    with contextlib.ExitStack() as opened:
        store = open_store(options.ledger, folder)
        opened.callback(store.close)
        done = run(Plan(options.faults, options.seed, folder, options.pause), store, _say)
        _say("the last sweep, the audits and the verification")
        verdict = _judge(done, folder)
        text = "\n".join([*_heading(options, store, done), *verdict.lines()]) + "\n"
        if not verdict.clean and options.ledger == "sqlite":
            shutil.copy(store.url.removeprefix("sqlite:///"), folder / "ledger.db")
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    if not verdict.clean:
        print(f"what was found is in {folder}", file=sys.stderr)
        raise SystemExit(1)
    if not options.keep:
        shutil.rmtree(folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="The fault campaign.")
    parser.add_argument("--faults", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--seed", type=int, default=None, help="of all draws (default: of the clock; it is printed)")
    parser.add_argument("--ledger", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--pause", type=float, default=0.15, help="seconds between faults, on average (default: 0.15)")
    parser.add_argument("--out", type=Path, default=None, help="write the results there, too")
    parser.add_argument("--keep", action="store_true", help="keep the evidence, whatever it says")
    options = parser.parse_args()
    if options.faults < 1:
        parser.error("--faults: at least 1")
    if options.pause <= 0:
        parser.error("--pause: more than 0 seconds")
    if options.seed is None:
        options.seed = time.time_ns() % 2**31
    return options


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _judge(done: Done, folder: Path) -> Verdict:
    clients = {client: (done.api_keys[client], runs) for client, runs in done.runs.items()}
    with _server(done) as url, forkserver().Pool(1) as pool:  # the server's start is the last sweep
        audits = pool.apply(audit, (url, clients))
    exported = folder / "ledger.jsonl"
    with exported.open("wb") as lines:
        subprocess.run(_command("ledger", "export", *done.server_options), stdout=lines, check=True)
    verified = subprocess.run(
        _command("ledger", "verify", *done.server_options, "--public-key", done.public_key.hex()),
        capture_output=True,
        text=True,
        check=False,
    )
    with exported.open("rb") as lines:
        verdict = judge(Evidence(lines, done.public_key, read_lines(done.witness), read_lines(done.races), done.runs))
    verdict.wrong["findings of `oracle-server ledger verify`"] = (
        [] if verified.returncode == 0 else verified.stderr.splitlines()
    )
    verdict.wrong["differences in `defender-client audit`"] = audits
    verdict.wrong["unforeseen exceptions in the servers' logs"] = _exceptions(done.server_log)
    verdict.wrong["what the campaign did not manage"] = done.failures
    return verdict


def _exceptions(log: Path) -> list[str]:
    """The last line of each traceback; but for a client's that went away, which is the fault that was injected."""
    found, inside = [], False
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("Traceback"):
            inside = True
        elif inside and not line.startswith(" "):
            inside = False
            if line != "starlette.requests.ClientDisconnect":
                found.append(line)
    return found


@contextlib.contextmanager
def _server(done: Done) -> Iterator[str]:
    """A server by the real command, ended in good order."""
    command = _command("serve", "--port", "0", *done.server_options)
    with (
        done.server_log.open("ab") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as child,
    ):
        assert child.stdout is not None
        try:
            line = child.stdout.readline()
            if not line.startswith("listening on "):
                raise RuntimeError("the last server did not start: its log says why")
            yield line.removeprefix("listening on ").strip()
        finally:
            child.terminate()
            if child.wait(60) != 0:
                done.failures.append(f"the last server ended with exit code {child.returncode}")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "oracle_server", *arguments]


def _heading(options: argparse.Namespace, store: Store, done: Done) -> Iterator[str]:
    command = f"python -m benchmarks.faults --faults {options.faults} --seed {options.seed} --ledger {options.ledger}"
    yield f"{shlex.join(shlex.split(command))}"
    yield f"commit {_commit()}, Python {platform.python_version()}, {os.cpu_count()} CPUs, {platform.system()}"
    yield f"disk full: {store.how_full or 'not possible here'}"
    yield f"{done.faults.total()} faults in {done.seconds:.0f} s; {done.missed} more draws found nothing to happen to"
    yield ""
    for name, count in sorted(done.faults.items()):
        yield f"{name:<66}{count:>10,}"
    yield f"{'faults':<66}{done.faults.total():>10,}"
    yield ""
    for name, count in done.notes.items():
        yield f"{name:<66}{count:>10,}"


def _commit() -> str:
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
    except FileNotFoundError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
