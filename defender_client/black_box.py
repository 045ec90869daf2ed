"""The black box that the search queries: f'(w), the oracle with the defender's decoder merged into it.

    f'(w) = f(Dec(w))    (Zhang et al., ICLR 2022, section 4; without an autoencoder f(clamp(w)), in pixels)

Who merges it, and what travels, is settled with the oracle once, in the best form that it takes:

    merged     the oracle has the decoder: latents travel, and probes of them as what they are made of
    factored   there is no decoder: probes of pixels travel as what they are made of
    images     the rows themselves, decoded here: any server of the protocol takes them

The rows that are paid for are the same. What is decoded there may differ from what is decoded here by float32 rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from defender_client.config import ConfigError, Form
from defender_client.oracle import Oracle
from defender_client.questions import Factored, Images, Latents, Question
from defender_client.stack import Stack
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
        self._decoder = _merged(stack, oracle) if form in ("auto", "merged") else None
        self.form: Settled = "images"
        if self._decoder is not None:
            self.form = "merged"
        elif form in ("auto", "factored") and stack.autoencoder is None and oracle.info.factored:
            self.form = "factored"
        if form not in ("auto", self.form):
            raise ConfigError(f"query_form={form}: {_WHY_NOT[form]}; query_form=auto takes the best form that there is")

    @torch.no_grad()
    def logits(self, points: Tensor, *, purpose: str, label: str) -> Tensor:
        """Logits [n, k] of f' at points [n, d]; n queries."""
        return self._answers(self._questions(points), purpose, label)

    @torch.no_grad()
    def probed(self, probes: Probes, *, purpose: str, label: str) -> Tensor:
        """Logits [n, p, k] of f' at an estimator's probes; n p queries."""
        questions = self._images_of(probes) if self.form == "images" else [Factored(probes, self._decoder)]
        return self._answers(questions, purpose, label).view(probes.n, probes.p, -1)

    def _answers(self, questions: Iterable[Question], purpose: str, label: str) -> Tensor:
        answers = [
            self._oracle.ask(question, purpose=purpose, label=f"{label}/{position}")
            for position, question in enumerate(questions)
        ]
        return torch.from_numpy(answers[0] if len(answers) == 1 else np.concatenate(answers))

    def _questions(self, points: Tensor) -> Iterator[Question]:
        if self._decoder is not None:
            yield Latents(points.numpy(), self._decoder)
            return
        for part in points.split(self._query_rows):
            yield self._images(part)

    def _images_of(self, probes: Probes) -> Iterator[Question]:
        # In pieces, so that memory is bounded by query_rows and not by the number of probes.
        for start in range(0, len(probes), self._query_rows):
            yield self._images(torch.from_numpy(probes.expand(start, min(start + self._query_rows, len(probes)))))

    def _images(self, points: Tensor) -> Images:
        return Images(self._stack.back(points).numpy())


_WHY_NOT = {
    "merged": "the oracle takes no decoders, or not this one, or the stack has no autoencoder",
    "factored": "the oracle reads no factored batches, or the stack has an autoencoder (that is query_form=merged)",
    "images": "",
}


def _merged(stack: Stack, oracle: Oracle) -> str | None:
    """The id under which the oracle has the stack's decoder; None where it cannot have it."""
    if stack.autoencoder is None or not (oracle.info.factored and oracle.info.decoders):
        return None
    try:
        content = write(*decoder_of(stack.autoencoder))
    except DecoderError:
        return None
    return oracle.register(content)
