"""Real servers that are killed at any instruction and started again, as a supervisor would."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from ctypes import c_double
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path

_TICK_S = 0.01
PRELOADED = [
    "benchmarks.faults.defenders",
    "benchmarks.faults.racers",
    "defender_client.audit",
    "oracle_server.cli",
    "oracle_server.server",
]


def forkserver() -> ForkServerContext:
    """Processes forked from one that has loaded torch and both programs: as real as any other, and there at once."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ensure_running()  # loading takes seconds: it begins now
    return context


def serve(arguments: list[str], output: str, clock_shift: c_double) -> None:
    """`oracle-server ARGUMENTS` in this process, by a clock that is wrong by `clock_shift` seconds, at any moment.

    `clock_shift` is shared memory without a lock: one that a killed server held would stop all after it.
    """
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from oracle_server import cli, clock

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=clock_shift.value)

    vars(clock)["datetime"] = Shifted
    cli.app(arguments)


@dataclass
class Slot:
    """A place for a server: a port, and whoever serves there now.

    Attributes:
        restart_at: when it is started again after it ended; monotonic.
        by_command: whether the next start is `python -m oracle_server serve` itself.
        generation: counts its starts.
    """

    port: int
    clock_shift: c_double
    process: BaseProcess | subprocess.Popen[bytes] | None = None
    restart_at: float = 0.0
    by_command: bool = False
    generation: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def alive(self) -> bool:
        match self.process:
            case None:
                return False
            case subprocess.Popen() as child:
                return child.poll() is None
            case forked:
                return forked.is_alive()

    def signal(self, number: int) -> bool:
        """Send a signal; whether a process was there to get it."""
        with self.lock:
            if not self.alive or self.process is None or self.process.pid is None:
                return False
            try:
                os.kill(self.process.pid, number)
            except ProcessLookupError:  # it ended on its own just now, and its parent has seen it
                return False
            return True


class Fleet:
    """Servers over one ledger, each started again whenever it has ended.

    Args:
        context: of `forkserver()`.
        options: of `oracle-server serve`, without the port.
        log: the file that all of them write their log to.
        count: how many.
    """

    def __init__(self, context: ForkServerContext, options: list[str], log: Path, count: int) -> None:
        self._context, self._options, self._log = context, options, log
        self.slots = [Slot(port, context.RawValue(c_double, 0.0)) for port in _free_ports(count)]
        self.starts = self.starts_by_command = 0
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor")
        self._supervisor.start()

    def ports(self) -> list[int]:
        """Of the servers that run now."""
        return [slot.port for slot in self.slots if slot.alive]

    def pids(self) -> list[int]:
        """Of the servers that run now."""
        return [slot.process.pid for slot in self.slots if slot.alive and slot.process and slot.process.pid]

    def kill(self, slot: Slot, down_for: float, number: int = signal.SIGKILL) -> bool:
        """End a server; it is started again `down_for` seconds later. Whether there was one."""
        with slot.lock:
            slot.restart_at = time.monotonic() + down_for
            return slot.signal(number)

    def stop(self) -> None:
        """End them all in good order."""
        self._stopping.set()
        self._supervisor.join()
        for slot in self.slots:
            slot.signal(signal.SIGCONT)
            slot.signal(signal.SIGTERM)
        deadline = time.monotonic() + 40
        while any(slot.alive for slot in self.slots) and time.monotonic() < deadline:
            time.sleep(_TICK_S)
        for slot in self.slots:
            slot.signal(signal.SIGKILL)
            _reap(slot)

    def _supervise(self) -> None:
        while not self._stopping.wait(_TICK_S):
            for slot in self.slots:
                with slot.lock:
                    if not slot.alive and time.monotonic() >= slot.restart_at:
                        self._start(slot)

    def _start(self, slot: Slot) -> None:
        _reap(slot)
        arguments = ["serve", "--port", str(slot.port), *self._options]
        self.starts += 1
        if slot.by_command:
            self.starts_by_command += 1
            slot.by_command = False
            with self._log.open("ab") as log:
                slot.process = subprocess.Popen(
                    [sys.executable, "-m", "oracle_server", *arguments], stdout=log, stderr=log
                )
        else:
            slot.process = self._context.Process(target=serve, args=(arguments, str(self._log), slot.clock_shift))
            slot.process.start()
        slot.generation += 1
        slot.restart_at = time.monotonic() + 0.2  # a start that fails is not tried again at once


def _reap(slot: Slot) -> None:
    match slot.process:
        case subprocess.Popen() as child:
            child.wait()
        case BaseProcess() as forked:
            forked.join()
            forked.close()
    slot.process = None


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
