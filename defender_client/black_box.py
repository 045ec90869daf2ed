"""The black box that the search queries: f'(w), the oracle with the defender's decoder merged into it.

    f'(w) = f(Dec(w))    (Zhang et al., ICLR 2022, section 4; without an autoencoder f(clamp(w)), in pixels)

Who merges it, and what travels, is settled with the oracle once, in the best form that it takes:

    merged     the oracle has the decoder: latents travel, and probes of them as what they are made of
    factored   there is no decoder: probes of pixels travel as what they are made of
    images     the rows themselves, decoded here: any server of the protocol takes them

Where the oracle reads no ragged batches, their rows are sent one by one: latents where it has the decoder, else images.

The rows that are paid for are the same. What is decoded there may differ from what is decoded here by float32 rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from defender_client.config import ConfigError, Form
from defender_client.oracle import Oracle, OracleInfo
from defender_client.questions import Factored, Images, Latents, Question
from defender_client.stack import Stack, StackSpec
from shared.models.decoder import DecoderError, decoder_of, write
from shared.wire.probes import Probes

Settled = Literal["merged", "factored", "images"]


class BlackBox:
    """f' of a stack, asked of an oracle; used by several threads at once.

    Args:
        stack: whose decoder is merged in.
        oracle: who answers.
        query_rows: rows of a request, at most, where they are images.
        form: what to send; "auto" for the best that the oracle takes.

    Attributes:
        form: what is sent.

    Raises:
        ConfigError: a form other than "auto" that this oracle does not take, or that this stack does not have.
        OracleError: the oracle could not be asked what it takes.
    """

    def __init__(self, stack: Stack, oracle: Oracle, query_rows: int, form: Form = "auto") -> None:
        self._stack, self._oracle, self._query_rows = stack, oracle, query_rows
        self.form = best_form(stack.spec, oracle.info) if form == "auto" else form
        self._decoder = _merged(stack, oracle) if self.form == "merged" else None
        if form == "auto" and self.form == "merged" and self._decoder is None:
            self.form = "images"
        possible = {"merged": self._decoder is not None, "factored": best_form(stack.spec, oracle.info) == "factored"}
        if not possible.get(self.form, True):
            raise ConfigError(f"query_form={form}: {_WHY_NOT[form]}; query_form=auto takes the best form that there is")

    @property
    def answers(self) -> int:
        """k, the length of an answer."""
        return self._oracle.info.classes

    @torch.no_grad()
    def logits(self, points: Tensor, *, purpose: str, label: str) -> Tensor:
        """Logits [n, k] of f' at points [n, d]; n queries."""
        if self._decoder is not None:
            return torch.from_numpy(self._oracle.ask(self._each(points), purpose=purpose, label=label))
        whole = len(points) <= self._query_rows
        labels = iter([label]) if whole else (f"{label}/{piece}" for piece in itertools.count())
        return self._in_pieces(len(points), lambda start, stop: points[start:stop], purpose, labels)

    @torch.no_grad()
    def probed(self, probes: Probes, *, purpose: str, label: str) -> Tensor:
        """Logits of f' at an estimator's probes, a query each: [n, p, k], or [rows, k] of ragged ones, where those of
        point i begin at `probes.starts[i]`."""
        ragged = probes.counts is not None
        if ragged and not len(probes):
            return torch.empty(0, self._oracle.info.classes)  # nothing is asked
        if self.form == "images" or (ragged and not self._oracle.info.counts):
            pieces = (f"{label}/{piece}" for piece in itertools.count())
            logits = self._in_pieces(len(probes), lambda a, b: torch.from_numpy(probes.expand(a, b)), purpose, pieces)
        else:
            logits = torch.from_numpy(
                self._oracle.ask(Factored(probes, self._decoder), purpose=purpose, label=f"{label}/0")
            )
        return logits if ragged else logits.view(probes.n, probes.p, -1)

    def _in_pieces(
        self, count: int, points: Callable[[int, int], Tensor], purpose: str, labels: Iterator[str]
    ) -> Tensor:
        """Logits [count, k] of points that are made, decoded (unless the oracle does it) and asked about in pieces, so
        that memory is bounded by query_rows and not by their number."""
        answers = []
        for start in range(0, count, self._query_rows):
            asked = self._each(points(start, min(start + self._query_rows, count)))
            answers.append(self._oracle.ask(asked, purpose=purpose, label=next(labels)))
        return torch.from_numpy(answers[0] if len(answers) == 1 else np.concatenate(answers))

    def _each(self, points: Tensor) -> Question:
        """Points [m, d], each of them sent."""
        if self._decoder is None:
            return Images(self._stack.back(points).cpu().numpy())
        return Latents(points.cpu().numpy(), self._decoder)


def best_form(spec: StackSpec, info: OracleInfo) -> Settled:
    """The best form that an oracle says it takes for a stack."""
    if not info.factored:
        return "images"
    if spec.autoencoder is None:
        return "factored"
    return "merged" if info.decoders else "images"


_WHY_NOT = {
    "merged": "the oracle takes no decoders, or not this one, or the stack has no autoencoder",
    "factored": "the oracle reads no factored batches, or the stack has an autoencoder (that is query_form=merged)",
}


def _merged(stack: Stack, oracle: Oracle) -> str | None:
    """The id under which the oracle has the stack's decoder; None where it cannot have it."""
    if stack.autoencoder is None:
        return None
    try:
        content = write(*decoder_of(stack.autoencoder))
    except DecoderError:
        return None
    return oracle.register(content)
