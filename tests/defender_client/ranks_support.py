"""Ranks for tests: commands in processes that find each other as under torchrun, and torchrun itself."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from defender_support import Command, command


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def ranks(size: int, *arguments: str | Path, folder: Path, key: str) -> Iterator[list[Command]]:
    """`defender_client ARGUMENTS` in as many processes, with the environment that torchrun gives them."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                command(
                    "defender_client",
                    *arguments,
                    output=folder / f"rank{rank}.log",
                    environment={
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(size),
                        "LOCAL_WORLD_SIZE": str(size),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                        "ORACLE_API_KEY": key,
                    },
                )
            )
            for rank in range(size)
        ]


def ended(started: list[Command], *codes: int) -> str:
    """Wait for all; their exit codes are these, or 0; what they said."""
    found = tuple(one.wait() for one in started)
    said = "\n".join(one.said for one in started)
    assert found == (codes or (0,) * len(started)), f"{found}: {said}"
    return said


@dataclass
class Torchrun:
    """`torchrun -m defender_client ARGUMENTS` under way."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def said(self) -> str:
        return self.output.read_text()

    def workers(self) -> list[int]:
        """The process ids of its ranks, in their order."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, IndexError, ValueError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    variables = (entry / "environ").read_bytes().split(b"\0")
                    rank = next(int(v[5:]) for v in variables if v.startswith(b"RANK="))
                    found[rank] = int(entry.name)
        return [found[rank] for rank in sorted(found)]


@contextlib.contextmanager
def torchrun(size: int, *arguments: str | Path, output: Path, key: str) -> Iterator[Torchrun]:
    """The real thing; killed at the end if it still runs."""
    options = ["--nproc-per-node", str(size), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    with output.open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                *options,
                "-m",
                "--",
                "defender_client",
                *map(str, arguments),
            ],
            stdout=log,
            stderr=log,
            env=os.environ | {"ORACLE_API_KEY": key, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
    started = Torchrun(process, output)
    try:
        yield started
    finally:
        left = started.workers()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        for worker in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        process.wait(30)
