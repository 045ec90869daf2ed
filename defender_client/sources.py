"""Where a job's answers come from: an oracle that is asked, ours or a foreign one, or the recording of a run that asked
it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from defender_client.endpoint import Endpoint, PythonEndpoint, described
from defender_client.errors import ConfigError
from defender_client.foreign import Asker, ForeignOracle, PlannedOracle
from defender_client.foreign_callable import ForeignCallable
from defender_client.local_ledger import Asked, LocalLedger, local_statement
from defender_client.oracle import Oracle
from defender_client.oracle_client import RemoteOracle, asker, keeps_a_ledger
from defender_client.pinning import pin
from defender_client.query_log import LOG_FILE, QueryLog, log_file, log_files
from defender_client.ranks import ALONE, Ranks
from defender_client.recording import ANSWERS_FILE, Recorder, Recording
from defender_client.replay import Replay
from shared.wire import protocol


class Source(Protocol):
    """Opens an oracle for a run, whose directory is locked and whose id is the first part of every key."""

    def open(self, run: Path, run_id: str, ranks: Ranks = ALONE) -> AbstractContextManager[Oracle]:
        """The oracle until the block ends; its log is the run's, or this rank's part of it.

        Raises:
            ConfigError: it is for a process of its own, and there are several ranks.
        """


class LiveSource(Source, Protocol):
    """A source that can also be asked about its shapes and its account outside of any run."""

    def connect(self, run: Path | None = None) -> AbstractContextManager[Oracle]:
        """The oracle until the block ends; `run` is a run that may have begun, whose account it is."""


@dataclass(frozen=True)
class LiveOracle:
    """An oracle of ours, behind HTTP.

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

    def connect(self, run: Path | None = None) -> RemoteOracle:
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
class ForeignSource:
    """An oracle that is not ours.

    Attributes:
        endpoint: how it is asked.
        api_key: sent as `Authorization: Bearer`; None for an endpoint that asks for none.
        budget: queries that a run may spend in all; None for what its ledger says.
        ca: PEM file of the authorities to trust, for a server with a private one.
        key_file: of the key that signs the ledger; None for one in the run's directory.
    """

    endpoint: Endpoint
    api_key: str | None = field(repr=False, default=None)
    budget: int | None = None
    ca: Path | None = None
    key_file: Path | None = None

    def connect(self, run: Path | None = None) -> PlannedOracle:
        """The oracle outside of any run, with the account that `run` has, or will begin with."""
        kept = local_statement(run) if run is not None else None
        spent, budget = (kept.spent, kept.budget) if kept is not None else (0, None)
        budget = self.budget if self.budget is not None else budget
        statement = None
        if budget is not None:
            left = max(0, budget - spent)
            statement = protocol.BudgetStatement(client=self.endpoint.name, budget=budget, spent=spent, remaining=left)
        return PlannedOracle(self._asker(), statement)

    @contextmanager
    def open(self, run: Path, run_id: str, ranks: Ranks = ALONE) -> Iterator[ForeignOracle]:
        """The oracle for a run, with its ledger, log and recording in the run's directory."""
        if not ranks.alone:
            raise ConfigError(
                "the ledger of an oracle that is not ours is one process's to write: start the run without torchrun"
            )
        with ExitStack() as stack:
            asked = Asked(self.endpoint.name, self.endpoint.identity)
            speaking = stack.enter_context(closing(self._asker()))
            ledger = stack.enter_context(closing(LocalLedger(run, asked, self.budget, self.key_file)))
            log = stack.enter_context(closing(QueryLog(run / LOG_FILE)))
            yield stack.enter_context(ForeignOracle(speaking, ledger, log, run, run_id))

    def _asker(self) -> Asker:
        if isinstance(self.endpoint, PythonEndpoint):
            return ForeignCallable(self.endpoint)
        return asker(self.endpoint, self.api_key, self.ca)


@dataclass(frozen=True)
class ServerAt:
    """The server at an address: whether it is one of ours, it must say itself. Attributes as of the two that it may be;
    `changes` are values of a foreign endpoint's description."""

    url: str
    api_key: str | None = field(repr=False)
    ca: Path | None = None
    record: bool = False
    budget: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    key_file: Path | None = None

    def connect(self, run: Path | None = None) -> AbstractContextManager[Oracle]:
        """The oracle outside of any run."""
        return self._settled().connect(run)

    def open(self, run: Path, run_id: str, ranks: Ranks = ALONE) -> AbstractContextManager[Oracle]:
        """The oracle for a run."""
        return self._settled().open(run, run_id, ranks)

    def _settled(self) -> LiveSource:
        if not keeps_a_ledger(self.url, self.api_key, self.ca):
            endpoint = described(self.url, {"model": protocol.MODEL_NAME, **self.changes})
            if endpoint is None:
                raise ConfigError(f"{self.url} is not one of ours: name its model, {self.url}/v2/models/NAME")
            return ForeignSource(endpoint, self.api_key, self.budget, self.ca, self.key_file)
        if self.budget is not None or self.changes:
            raise ConfigError(
                f"{self.url} keeps a ledger and says itself how it is asked: leave --budget, --input, --output and "
                "--endpoint out"
            )
        return LiveOracle(self.url, self.api_key, self.ca, self.record)


def source_of(
    oracle: str,
    api_key: str | None,
    ca: Path | None = None,
    *,
    record: bool = False,
    budget: int | None = None,
    changes: Mapping[str, Any] | None = None,
    key_file: Path | None = None,
) -> LiveSource:
    """The oracle that `--oracle` names: an address, a description's file, or python:MODULE:NAME; nothing is asked yet.

    Raises:
        ConfigError: it names none.
    """
    endpoint = described(oracle, changes or {})
    if endpoint is None:
        return ServerAt(oracle, api_key, ca, record, budget, changes or {}, key_file)
    return ForeignSource(endpoint, api_key, budget, ca, key_file)


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
