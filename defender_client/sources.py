"""Where a job's answers come from: an oracle that is asked, or the recording of a run that asked it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from defender_client.oracle import Oracle
from defender_client.oracle_client import RemoteOracle
from defender_client.pinning import pin
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.recording import ANSWERS_FILE, Recorder, Recording
from defender_client.replay import Replay


class Source(Protocol):
    """Opens an oracle for a run, whose directory is locked and whose id is the first part of every key."""

    def open(self, run: Path, run_id: str) -> AbstractContextManager[Oracle]:
        """The oracle until the block ends; its log is the run's."""


@dataclass(frozen=True)
class LiveOracle:
    """An oracle behind HTTP.

    Attributes:
        url: the server's address.
        api_key: None for a server that asks for none.
        ca: PEM file of the authorities to trust, for a server with a private one.
        record: whether a run's answers are kept in its directory.
    """

    url: str
    api_key: str | None = field(repr=False)
    ca: Path | None = None
    record: bool = False

    def connect(self) -> RemoteOracle:
        """The oracle outside of any run."""
        return RemoteOracle(self.url, self.api_key, ca=self.ca)

    @contextmanager
    def open(self, run: Path, run_id: str) -> Iterator[RemoteOracle]:
        """The oracle for a run: its id in every Idempotency-Key, its log and recording in the run's directory."""
        with ExitStack() as stack:
            log = stack.enter_context(closing(QueryLog(run / LOG_FILE)))
            recorder = stack.enter_context(closing(Recorder(run / ANSWERS_FILE))) if self.record else None
            oracle = stack.enter_context(
                RemoteOracle(self.url, self.api_key, ca=self.ca, log=log, recorder=recorder, run_id=run_id)
            )
            pin(run, oracle.ledger())
            yield oracle


@dataclass(frozen=True)
class RecordedRun:
    """A run that was recorded, by its directory."""

    run: Path

    @contextmanager
    def open(self, run: Path, run_id: str) -> Iterator[Replay]:
        """The recording as an oracle: no network, no queries."""
        with Recording(self.run) as recording, closing(QueryLog(run / LOG_FILE)) as log:
            yield Replay(recording, log)

    def unrecorded(self) -> dict[str, int]:
        """Answered requests of the recorded run that the recording does not have, by purpose."""
        with Recording(self.run) as recording:
            return dict(recording.unrecorded())
