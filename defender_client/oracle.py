"""What a job knows of an oracle, whether it answers over HTTP or from a recording."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt, Strict

from defender_client.query_log import QueryLog
from shared.measurements import Measurement
from shared.wire import protocol

if TYPE_CHECKING:
    from defender_client.questions import Question

Scores = Literal["logits", "probabilities", "label"]
"""What a vector of k scores is: logits; probabilities; 1 at the label and 0 elsewhere."""

SCORES: tuple[Scores, ...] = get_args(Scores)

# A probability that was rounded to 0 has no logarithm.
_TINY = np.finfo(np.float32).tiny
_Count = Annotated[PositiveInt, Strict()]


class WaitGivenUp(Exception):
    """A request was not made, or not again, because it would have had to wait: see `Oracle.stop_waiting`."""


class OracleInfo(BaseModel):
    """What the oracle says of itself.

    Attributes:
        image_shape: (c, h, w) of the images it takes.
        classes: length k of a flat answer: of a vector of scores, or c h w of a reconstruction.
        max_rows: the largest batch it takes in one request, by its own limits on rows and on bytes.
        scores: what its scores are.
        row_limit: the largest number of rows in one request, if it says so, whatever their size.
        body_limit: the largest request, in bytes, if it says so.
        factored: whether it reads factored batches (`shared.wire.probes`).
        counts: whether these may be ragged, with a number of directions for each point.
        decoders: whether a decoder can be registered with it, and merged into its model.
        task: what it answers with: scores of classes, or a reconstruction. What follows is None for a classifier.
        output_shape: (c, h, w) of a reconstruction.
        measurement: what a reconstructor's images are back-projections of (`shared.measurements`).
        abstains: whether a row of zeros is an abstention, of an oracle that answers with labels.
    """

    model_config = ConfigDict(frozen=True)

    image_shape: tuple[_Count, _Count, _Count]
    classes: _Count
    max_rows: _Count
    scores: Scores = "logits"
    row_limit: _Count | None = None
    body_limit: _Count | None = None
    factored: bool = False
    counts: bool = False
    decoders: bool = False
    task: protocol.Task = "classification"
    output_shape: tuple[_Count, _Count, _Count] | None = None
    measurement: Measurement | None = None
    abstains: bool = False

    @property
    def output_name(self) -> str:
        """What its answers are called on the wire."""
        return protocol.OUTPUT_NAMES[self.task]

    def answered(self, flat: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an answer on the wire, of its flat shape (..., k)."""
        return flat if self.output_shape is None else (*flat[:-1], *self.output_shape)

    def logits(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores [n, k] as logits [n, k], float32.

        Probabilities p become log(max(p, tiny)), tiny the smallest normal float32: the logits up to a constant of each
        row, which neither a softmax nor an argmax sees; where the oracle rounds, what it rounded away is gone. Labels
        stay as they are, 1 and 0: their argmax is the label, and there is no more to them. So do reconstructions.
        """
        return np.log(np.maximum(scores, _TINY)) if self.scores == "probabilities" else scores


class Oracle(Protocol):
    """A model that may only be asked: what training, certification and the plan use of it.

    `query` may be called by several threads at once; what an answer is and costs does not depend on their order.
    """

    @property
    def info(self) -> OracleInfo:
        """Shapes and limits."""

    @property
    def log(self) -> QueryLog:
        """The run's own account; its totals are what this run has spent."""

    @property
    def remaining(self) -> int | None:
        """Queries left of the budget by the last answer; None if that is not known."""

    @property
    def cost(self) -> int:
        """Queries paid in all for the run's answers so far, when they were bought: the run's own spending, or, in a
        replay, that of the run that was recorded."""

    def query(self, images: NDArray[np.float32], *, purpose: str, label: str) -> NDArray[np.float32]:
        """Logits float32 [n, k] of images float32 [n, c, h, w] in [0, 1]; of a reconstructor, its pixels [n, c h w].

        Args:
            images: the batch.
            purpose: what the queries are for (`labels`, `train`, `certify`, ...); kept in the log.
            label: names this batch within the run.
        """

    def ask(self, question: Question, *, purpose: str, label: str) -> NDArray[np.float32]:
        """Logits float32 [rows, k] of a question's rows; arguments as `query`.

        The question must be of a form that `info` says it takes.
        """

    def register(self, decoder: bytes) -> str | None:
        """Have a decoder's file (`shared.models.decoder`) merged into the model; its id, or None where this oracle
        does not take it. Costs no query; the same file has the same id, however often it is registered."""

    def stop_waiting(self) -> None:
        """From now on no request waits for long, for the server's limits or for a connection; those that wait, or would
        have to, raise `WaitGivenUp`. May be called by a signal's handler."""

    def budget(self) -> protocol.BudgetStatement | None:
        """The caller's account; None where none is kept."""

    def charges(self) -> Iterator[protocol.ChargeEntry]:
        """The caller's own ledger entries, oldest first; NotFound where no ledger is kept."""

    def metrics(self) -> str:
        """Metrics in Prometheus' text form; NotFound where there are none."""
