"""A run had again from its recording: the same answers, at zero queries, with no oracle anywhere.

A request is known again by its label and its body's digest, whatever the run's id. Batches are split as they were split
when they were bought, whatever the limits were then: the recording says how many rows stand under each label.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from defender_client.oracle import OracleInfo
from defender_client.query_log import QueryLog, ReplayedAnswer
from defender_client.questions import Images, Question
from defender_client.recording import NotRecorded, RecordedAnswer, Recording
from shared.models.decoder import decoder_id, read
from shared.wire import protocol
from shared.wire.errors import NotFound


class Replay:
    """An `Oracle` that answers from a recording.

    Args:
        recording: of the run to have again.
        log: of the run that is made of it; every answer is noted there as one that cost nothing.
    """

    def __init__(self, recording: Recording, log: QueryLog) -> None:
        self._recording, self.log = recording, log
        self._lock = threading.Lock()
        # By purpose: the largest cost of its answers so far. Those of one step came in an order of their own, and the
        # run had paid for the step when it had the last of them.
        self._costs: dict[str, int] = {}
        self._cost = 0
        for answer in log.replays.values():  # a replay that was killed goes on where it was
            self._pay(answer)

    @property
    def info(self) -> OracleInfo:
        """What the oracle said of itself when it was last asked."""
        return self._recording.info

    @property
    def remaining(self) -> None:
        """No budget is touched."""

    @property
    def cost(self) -> int:
        """What the recorded run had paid when it had all the answers that this one got for its last purpose."""
        return self._cost

    def stop_waiting(self) -> None:
        """A recording never waits."""

    def query(self, images: NDArray[np.float32], *, purpose: str, label: str) -> NDArray[np.float32]:
        """Logits of a batch, as `ask` has them; arguments as `Oracle.query`."""
        return self.ask(Images(images), purpose=purpose, label=label)

    def ask(self, question: Question, *, purpose: str, label: str) -> NDArray[np.float32]:
        """Logits of a question's rows, as they were answered when it was recorded; arguments as `Oracle.ask`.

        Raises:
            NotRecorded: the recording has no such request.
            RecordingDamaged: its answer is not what was recorded.
        """
        parts: list[NDArray[np.float32]] = []
        start = 0
        while not parts or start < len(question):
            answer = self._find(question.take(start, len(question)) if start else question, f"{label}/{start}")
            parts.append(answer.oracle.logits(self._recording.read(answer)))
            replayed = ReplayedAnswer(str(answer.key), purpose, answer.rows, answer.cost)
            with self._lock:
                self._pay(replayed)
                self.log.replayed(replayed)
            start += answer.rows
        return np.concatenate(parts)

    def _pay(self, answer: ReplayedAnswer) -> None:
        self._cost = self._costs[answer.purpose] = max(answer.cost, self._costs.get(answer.purpose, 0))

    def _find(self, question: Question, label: str) -> RecordedAnswer:
        """The newest answer under `label` to the first of these rows, however many it took."""
        answer = self._recording.find(question, label)
        if answer is None:
            self._refuse(label, other_images=bool(self._recording.answers(label)))
        return answer

    def _refuse(self, label: str, *, other_images: bool) -> NoReturn:
        what = f"an answer to '{label}' for other images only" if other_images else f"no answer to '{label}'"
        missing = self._recording.unrecorded()
        why = (
            f"the recording is partial: {missing.total():,} of that run's answered requests are not in it "
            f"({described(missing)}), because --record was not given whenever it ran"
            if missing
            else "this run differs from the recorded one, probably in its preset, a --set, seed, data or version, "
            "or it goes further than that one went"
        )
        raise NotRecorded(f"the recording of {self._recording.run} has {what}: {why}")

    def register(self, decoder: bytes) -> str | None:
        """The decoder's id, if it was registered when it was recorded."""
        return decoder_id(*read(decoder)) if self.info.decoders else None

    def budget(self) -> None:
        """A recording keeps no account."""

    def charges(self) -> Iterator[protocol.ChargeEntry]:
        """A recording has no ledger: NotFound."""
        raise NotFound("a recording has no ledger")

    def metrics(self) -> str:
        """A recording has no metrics: NotFound."""
        raise NotFound("a recording has no metrics")


def described(purposes: dict[str, int]) -> str:
    """Counts by purpose in words."""
    return ", ".join(f"{count:,} of {purpose}" for purpose, count in sorted(purposes.items()))
