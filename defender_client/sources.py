"""Where a job's answers come from: an oracle that is asked, or the recording of a run that asked it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from defender_client.errors import ConfigError
from defender_client.oracle import Oracle
from defender_client.oracle_client import RemoteOracle
from defender_client.pinning import pin
from defender_client.query_log import LOG_FILE, QueryLog, log_file, log_files
from defender_client.ranks import ALONE, Ranks
from defender_client.recording import ANSWERS_FILE, Recorder, Recording
from defender_client.replay import Replay


class Source(Protocol):
    """Opens an oracle for a run, whose directory is locked and whose id is the first part of every key."""

    def open(self, run: Path, run_id: str, ranks: Ranks = ALONE) -> AbstractContextManager[Oracle]:
        """The oracle until the block ends; its log is the run's, or this rank's part of it.

        Raises:
            ConfigError: it is for a process of its own, and there are several ranks.
        """


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
    def open(self, run: Path, run_id: str, ranks: Ranks = ALONE) -> Iterator[RemoteOracle]:
        """The oracle for a run: its id in every Idempotency-Key, its log and recording in the run's directory."""
        if self.record and not ranks.alone:
            raise ConfigError(
                "--record keeps the answers of one process: leave it out, or start the run without torchrun"
            )
        with ExitStack() as stack:
            log = stack.enter_context(closing(_log(run, ranks)))
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
    def open(self, run: Path, run_id: str, ranks: Ranks = ALONE) -> Iterator[Replay]:
        """The recording as an oracle: no network, no queries."""
        if not ranks.alone:
            raise ConfigError("--replay asks no oracle, and there is nothing to share out: start it without torchrun")
        with Recording(self.run) as recording, closing(QueryLog(run / LOG_FILE)) as log:
            yield Replay(recording, log)

    def unrecorded(self) -> dict[str, int]:
        """Answered requests of the recorded run that the recording does not have, by purpose."""
        with Recording(self.run) as recording:
            return dict(recording.unrecorded())


def _log(run: Path, ranks: Ranks) -> QueryLog:
    """This rank's log. Those of ranks that the run had and has no more are rank 0's to count."""
    own = run / log_file(ranks.rank)
    beside = [path for path in log_files(run) if path != own]
    now = {run / log_file(rank) for rank in range(ranks.size)}
    return QueryLog(own, beside, [path for path in beside if path not in now] if ranks.leads else [])
