"""What the benchmarks share: candidates that take turns, medians and quartiles, processes that are told when to work.

A candidate is whatever answers one turn. In every round each has one, in an order drawn anew, so that a machine that
warms up or is disturbed does so to all of them; ratios are taken within a round.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

import psutil

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
_STOP_S = 10.0


# --- numbers ---


@dataclass(frozen=True)
class Spread:
    """Quartiles of a sample."""

    low: float
    median: float
    high: float

    def show(self, form: str = ".3g") -> str:
        """MEDIAN (LOW to HIGH)."""
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def spread(values: Sequence[float]) -> Spread:
    """Quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high)


def ratios(of: Sequence[float], to: Sequence[float]) -> Spread:
    """Quartiles of the ratios of two candidates, round by round."""
    return spread([a / b for a, b in zip(of, to, strict=True)])


def interleave(rounds: int, candidates: Mapping[str, Callable[[], T]], *, warm_up: int = 1) -> dict[str, list[T]]:
    """Results by candidate, a round each; those of the `warm_up` rounds before are dropped."""
    order, results = random.Random(0), {name: list[T]() for name in candidates}
    for round_ in range(-warm_up, rounds):
        for name in order.sample(list(candidates), len(candidates)):
            result = candidates[name]()
            if round_ >= 0:
                results[name].append(result)
        print(f"\rround {round_ + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "| " + " | ".join([cells[0].ljust(widths[0]), *rest]) + " |"

    rule = "|" + "|".join("-" * (widths[0] + 2) if n == 0 else "-" * (w + 1) + ":" for n, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


# --- the machine ---


def heading(*packages: str) -> str:
    """The command, the machine, the versions and the commit, for the top of a result."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "no commit"
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    program = sys.orig_argv[1:] if sys.orig_argv[1:2] == ["-m"] else sys.argv
    return "\n".join(
        [
            f"command: python {shlex.join(program)}",
            f"machine: {_cpu_model()}, {usable_cores()} usable cores, {psutil.virtual_memory().total / 2**30:.0f} GiB; "
            f"{platform.system()} {platform.release()}; load {os.getloadavg()[0]:.2f} at the start",
            f"versions: {', '.join(versions)}; commit {commit}",
        ]
    )


def version(package: str) -> str:
    """The version installed here; "not installed" if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def usable_cores() -> int:
    """Of this process's affinity mask."""
    return len(os.sched_getaffinity(0))


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def cpu_seconds(pid: int) -> float:
    """CPU seconds, user and system, of a process and its descendants until now."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    total = 0.0
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            total += times.user + times.system
    return total


class Disturbance:
    """How much of the machine others used: its busy time, without this process and its descendants."""

    def __init__(self) -> None:
        self._busy, self._own, self._start = _busy_seconds(), cpu_seconds(os.getpid()), time.monotonic()

    def cores(self) -> float:
        """Cores that others kept busy on average since the start; the descendants of then must still be there."""
        others = _busy_seconds() - self._busy - (cpu_seconds(os.getpid()) - self._own)
        return max(0.0, others / (time.monotonic() - self._start))

    def __str__(self) -> str:
        return f"others kept {self.cores():.2f} cores busy meanwhile; load {os.getloadavg()[0]:.2f} at the end"


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


# --- processes ---


class Failed(Exception):
    """A process did not start, or ended; the message is the last thing it said."""


class Child:
    """A process of ours, with whatever it starts: its own group, its output in a file.

    Args:
        command: what to run.
        environment: variables beside ours; None takes one of ours away.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str | None] | None = None) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by stop
        changed = dict(os.environ) | {"PYTHONPATH": str(ROOT)} | dict(environment or {})
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={name: value for name, value in changed.items() if value is not None},
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def cpu(self) -> float:
        """CPU seconds until now, with its descendants."""
        return cpu_seconds(self.pid)

    def line(self, timeout: float) -> str:
        """The next line it prints. Raises `Failed` if none comes."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise Failed(f"nothing within {timeout:.0f} s; last it said: {self.reason()}") from None
        if line is None:
            raise Failed(self.reason())
        return line

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self.reason()) from None

    def reason(self) -> str:
        """The last line of its log that names an error, else the last line."""
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line.split(":")[0]]
        return (errors or lines or ["it said nothing"])[-1]

    def stop(self) -> None:
        """End it, and what it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_S)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._log.close()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # closed by stop
            for line in self.process.stdout:
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


@dataclass(frozen=True)
class Turn:
    """One turn of a worker.

    Attributes:
        wall: seconds.
        cpu: CPU seconds of the worker itself.
        parts: what else it counted, by name.
    """

    wall: float
    cpu: float
    parts: dict[str, float] = field(default_factory=dict)


class Worker:
    """A process that works when it is told to and sleeps between; see `obey`. It starts at once, unwaited for.

    Args:
        command, environment: of the `Child`.
        patience: seconds that becoming ready, or a turn, may take.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str | None] | None = None,
        *,
        patience: float = 600.0,
    ) -> None:
        self._patience = patience
        self._what: str | None = None
        self.child = Child(command, environment)

    def ready(self) -> str:
        """Wait until it is ready; what it says of itself. Raises `Failed` if it does not get there."""
        if self._what is None:
            self._what = str(json.loads(self.child.line(self._patience)))
        return self._what

    def turn(self, amount: int) -> Turn:
        """Work `amount` units. Raises `Failed` if it ends instead."""
        self.ready()
        self.child.tell(str(amount))
        return Turn(**json.loads(self.child.line(self._patience)))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.child.stop()


Work = Callable[[int], dict[str, float] | None]


def obey(make_ready: Callable[[], tuple[Work, str]]) -> None:
    """Be a worker: do what comes on standard input, an amount a line, until it ends.

    What libraries print goes to standard error. `make_ready` gives the work, which may return parts for its `Turn`, and
    a few words on it.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: object) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    work, what = make_ready()
    answer(what)
    for line in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        parts = work(int(line))
        answer({"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu, "parts": parts or {}})


@contextlib.contextmanager
def ended_by_signal() -> Iterator[contextlib.ExitStack]:
    """A stack that is unwound on SIGTERM, too: whatever was started is ended."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        with contextlib.ExitStack() as stack:
            yield stack
    finally:
        signal.signal(signal.SIGTERM, before)
