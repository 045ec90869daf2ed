"""An oracle that is not ours: asked by an `Asker`, paid for on a ledger of the client's own.

    question -> the run's recording, if it was answered before | rows set aside -> asked -> recorded -> paid

Asking again costs again there, so every answer is recorded, and what is on record is not asked again: a kill costs at
most the requests that were in flight.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from defender_client import request_key
from defender_client.local_ledger import LocalLedger
from defender_client.oracle import OracleInfo
from defender_client.paying import Paying, settle_log
from defender_client.query_log import QueryLog
from defender_client.questions import Images, Question
from defender_client.recording import ANSWERS_FILE, Recorder, Recording
from defender_client.request_key import RequestKey
from defender_client.under_way import UnderWay
from shared.wire import protocol
from shared.wire.errors import NotFound, TooLarge

Float32 = NDArray[np.float32]

_CLOSING_SECONDS = 30.0


class Asker(Protocol):
    """A foreign endpoint: how it is asked, and nothing about what that costs. Used by several threads at once."""

    @property
    def info(self) -> OracleInfo:
        """Shapes and limits; asked once, and costs no query."""

    def scores(self, images: Float32, paying: Paying) -> Float32:
        """Scores [n, k], of the kind that `info` says, of images [n, c, h, w] in [0, 1], n at most its `max_rows`.

        Whatever leaves does so within `paying.attempt()`; the attempt that is answered is the last one.
        """

    def stop_waiting(self) -> None:
        """No request waits for long from now on."""

    def close(self) -> None:
        """Close connections."""


class ForeignOracle:
    """An `Oracle` of a run, in front of a foreign endpoint.

    Args:
        asker: the endpoint; closed with this.
        ledger: the run's; closed with this.
        log: the run's; closed with this.
        run: the run's directory, for its recording.
        run_id: first part of every key.
    """

    def __init__(self, asker: Asker, ledger: LocalLedger, log: QueryLog, run: Path, run_id: str) -> None:
        self.log = log
        self._asker, self._ledger, self._run, self._run_id = asker, ledger, run, run_id
        settle_log(ledger, log)
        self._recorder = Recorder(run / ANSWERS_FILE)
        self._recording: Recording | None = None
        self._opening = threading.Lock()
        self._books = threading.Lock()  # what is recorded of an answer and what is paid for it belong together
        self._under_way = UnderWay()

    @property
    def info(self) -> OracleInfo:
        """Shapes and limits, as the description and the endpoint say."""
        self._answers()
        return self._asker.info

    @property
    def remaining(self) -> int:
        """Queries left of the local budget."""
        return self._ledger.statement().remaining

    @property
    def cost(self) -> int:
        """Queries paid for this run's answers so far."""
        return self.log.total

    def budget(self) -> protocol.BudgetStatement:
        """The local ledger's account."""
        return self._ledger.statement()

    def charges(self) -> Iterator[protocol.ChargeEntry]:
        """The local ledger's charges, oldest first."""
        return self._ledger.charges()

    def metrics(self) -> str:
        """A foreign oracle's metrics, if it has any, are its own: NotFound."""
        raise NotFound("a foreign oracle's metrics are not known here")

    def register(self, decoder: bytes) -> None:
        """No foreign oracle takes a decoder."""

    def query(self, images: Float32, *, purpose: str, label: str) -> Float32:
        """Logits of a batch: `ask`, about images."""
        return self.ask(Images(images), purpose=purpose, label=label)

    def ask(self, question: Question, *, purpose: str, label: str) -> Float32:
        """Logits float32 [rows, k] of a question's rows, which are images; arguments as `Oracle.ask`.

        Raises:
            BudgetExhausted: the local budget does not cover a request; it was not sent.
            AnswersLost: a request was given up, its attempts paid.
            OracleError: the endpoint's refusal, or an answer that is none.
        """
        if not isinstance(question, Images):
            raise TypeError(f"a foreign oracle is asked about images, not about {type(question).__name__}")
        parts: list[Float32] = []
        start = 0
        while not parts or start < len(question):
            rest = question.take(start, len(question)) if start else question
            parts.append(self._first_rows(rest, purpose, f"{label}/{start}"))
            start += len(parts[-1])
        return self.info.logits(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def _first_rows(self, question: Images, purpose: str, label: str) -> Float32:
        """Scores of the first of these rows: those on record under this label, or as many as are taken at once."""
        answers = self._answers()
        known = answers.find(question, label)
        if known is not None:
            return answers.read(known)
        if not len(question):
            return np.empty((0, self.info.classes), np.float32)
        while True:
            rows = question.fitting(self.info, self.log.max_rows or len(question))
            try:
                return self._bought(question.take(0, rows), purpose, label)
            except TooLarge:
                if rows <= 1:
                    raise
                self.log.learn_max_rows(rows // 2)

    def _bought(self, question: Images, purpose: str, label: str) -> Float32:
        digest = request_key.whole_digest(question.encode(self.info.output_name))
        key = RequestKey.of(self._run_id, label, digest)
        paying = Paying(self._ledger, self.log, key, purpose, len(question), digest)
        with self._under_way:
            try:
                scores = self._asker.scores(question.values, paying)
            except BaseException:
                with self._books:
                    paying.settle("the answer cannot be used")
                raise
            with self._books:
                # Before it is paid: what the ledger calls paid with an answer is on record.
                self._answers().add(self._recorder.keep(str(key), scores, paying.total_after()))
                paying.settle()
        return scores

    def _answers(self) -> Recording:
        with self._opening:
            if self._recording is None:
                self._recorder.describe(self._asker.info)
                self._recording = Recording(self._run)
            return self._recording

    def stop_waiting(self) -> None:
        """No request waits for long from now on; those that would have to raise `WaitGivenUp`."""
        self._asker.stop_waiting()

    def close(self) -> None:
        """Let the requests of other threads be answered, if that is not long; close everything."""
        self.stop_waiting()
        try:
            self._under_way.end(_CLOSING_SECONDS)
        finally:
            self._asker.close()
            self._ledger.close()
            self.log.close()
            self._recorder.close()
            if self._recording is not None:
                self._recording.close()

    def __enter__(self) -> ForeignOracle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PlannedOracle:
    """A foreign oracle outside of any run: what a plan needs, and nothing that costs a query.

    Args:
        asker: the endpoint; closed with this.
        statement: the account as a run's ledger says, or as it will begin; None where no budget is known yet.
    """

    remaining: int | None = None
    cost = 0

    def __init__(self, asker: Asker, statement: protocol.BudgetStatement | None) -> None:
        self.log = QueryLog(None)
        self._asker, self._statement = asker, statement

    @property
    def info(self) -> OracleInfo:
        """As the endpoint says."""
        return self._asker.info

    def query(self, images: Float32, *, purpose: str, label: str) -> Float32:
        """Not outside of a run."""
        raise TypeError("a foreign oracle is asked within a run, which pays for it")

    def ask(self, question: Question, *, purpose: str, label: str) -> Float32:
        """Not outside of a run."""
        raise TypeError("a foreign oracle is asked within a run, which pays for it")

    def register(self, decoder: bytes) -> None:
        """No foreign oracle takes a decoder."""

    def stop_waiting(self) -> None:
        """No request waits for long from now on."""
        self._asker.stop_waiting()

    def budget(self) -> protocol.BudgetStatement | None:
        """The account, if it is known."""
        return self._statement

    def charges(self) -> Iterator[protocol.ChargeEntry]:
        """What a run's log has without an answer is paid, and is to be bought again: NotFound."""
        raise NotFound("an answer that was lost is bought again")

    def metrics(self) -> str:
        """NotFound."""
        raise NotFound("a foreign oracle's metrics are not known here")

    def close(self) -> None:
        """Close the endpoint."""
        self._asker.close()

    def __enter__(self) -> PlannedOracle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
