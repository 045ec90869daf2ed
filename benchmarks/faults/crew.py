"""The defenders' processes: each is started again on its own run directory whenever it was killed."""

from __future__ import annotations

import random
import signal
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.faults.work import Job, defend

_TICK_S = 0.01


@dataclass
class _Member:
    client: str
    job: Job
    process: BaseProcess | None = None
    starts: int = 0
    restart_at: float = 0.0
    exit_code: int | None = None  # of an end that was not a kill of ours
    lock: threading.RLock = field(default_factory=threading.RLock)


class Crew:
    """Args:
    context: of `servers.forkserver()`.
    jobs: with the client's name of each.
    finish: the file that tells them to finish.
    """

    def __init__(self, context: ForkServerContext, jobs: list[tuple[str, Job]], finish: Path) -> None:
        self._context, self._finish = context, finish
        self._members = [_Member(client, job) for client, job in jobs]
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep_all, name="crew")
        self._keeper.start()

    @property
    def starts(self) -> int:
        return sum(member.starts for member in self._members)

    @property
    def runs(self) -> dict[str, list[Path]]:
        """The run directories of each client."""
        runs: dict[str, list[Path]] = {}
        for member in self._members:
            runs.setdefault(member.client, []).append(member.job.run)
        return runs

    def kill(self, rng: random.Random) -> bool:
        """Kill one; it is started again soon. Whether there was one."""
        member = rng.choice(self._members)
        with member.lock:
            if member.process is None or not member.process.is_alive():
                return False
            member.process.kill()
            member.restart_at = time.monotonic() + rng.uniform(0, 0.5)
            return True

    def finish(self, seconds: float) -> list[str]:
        """Let each finish its step and end; returns what went wrong with it, a sentence each."""
        self._finish.touch()
        deadline = time.monotonic() + seconds
        while any(member.exit_code is None for member in self._members) and time.monotonic() < deadline:
            time.sleep(_TICK_S)
        return [
            f"the defender in {member.job.run.name} ended with exit code {member.exit_code}"
            if member.exit_code is not None
            else f"the defender in {member.job.run.name} did not finish within {seconds:.0f} s"
            for member in self._members
            if member.exit_code != 0
        ]

    def close(self) -> None:
        """Kill whoever still works."""
        self._stopping.set()
        self._keeper.join()
        for member in self._members:
            if member.process is not None:
                member.process.kill()
                member.process.join()
                member.process.close()

    def _keep_all(self) -> None:
        while not self._stopping.wait(_TICK_S):
            for member in self._members:
                with member.lock:
                    self._keep(member)

    def _keep(self, member: _Member) -> None:
        if member.process is not None and member.process.exitcode is not None:
            if member.process.exitcode != -signal.SIGKILL:
                member.exit_code = member.process.exitcode
            member.process.join()
            member.process.close()
            member.process = None
        if member.process is None and member.exit_code is None and time.monotonic() >= member.restart_at:
            member.process = self._context.Process(target=defend, args=(member.job,))
            member.process.start()
            member.starts += 1
