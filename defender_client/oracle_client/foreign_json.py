"""A JSON endpoint of any form: images are put where the description says, and scores are looked up where it says."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from defender_client.endpoint import JsonAnswer, JsonEndpoint
from defender_client.oracle import OracleInfo, Scores
from defender_client.oracle_client.connection import Connection
from defender_client.paying import Paying
from defender_client.presenting import as_png, as_scores, laid_out
from shared.wire import codec
from shared.wire.errors import UnexpectedAnswer

EACH = "*"


class ForeignJson:
    """An `Asker` for such an endpoint.

    Args:
        endpoint: the description.
        connection: to its server; closed with this.
    """

    def __init__(self, endpoint: JsonEndpoint, connection: Connection) -> None:
        self._endpoint, self._connection = endpoint, connection
        self._route = urlsplit(endpoint.url).path or "/"
        labels = endpoint.answer.labels
        self.info = OracleInfo(
            image_shape=endpoint.shape or (1, 1, 1),  # it has one, or it would be no endpoint
            classes=endpoint.classes or len(labels or ()),
            max_rows=1 if endpoint.request.single else endpoint.rows,
            scores=endpoint.scores,
        )

    def scores(self, images: NDArray[np.float32], paying: Paying) -> NDArray[np.float32]:
        """See `Asker`."""
        body = json.dumps(filled(self._endpoint, images), separators=(",", ":")).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        response = self._connection.post_paid(self._route, codec.Encoded((body,), None), headers, paying)
        try:
            answer = json.loads(response.content)
        except (ValueError, RecursionError):
            raise UnexpectedAnswer(f"{self._endpoint.name}: the answer is not JSON") from None
        single = self._endpoint.request.single
        found = read_scores(answer, self._endpoint.answer, self._endpoint.scores, len(images), single=single)
        return as_scores(found, len(images), self.info.classes, self.info.scores)

    def stop_waiting(self) -> None:
        """See `Asker`."""
        self._connection.stop_waiting()

    def close(self) -> None:
        """See `Asker`."""
        self._connection.close()


def server_of(url: str) -> str:
    """The address of the server that an endpoint's address is of."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def filled(endpoint: JsonEndpoint, images: NDArray[np.float32]) -> dict[str, Any]:
    """The object to send for images [n, c, h, w] in [0, 1]."""
    values: list[Any]
    if endpoint.request.encoding == "png":
        values = [as_png(image) for image in images]
    else:
        values = laid_out(images, endpoint.layout or "nchw", "FP32", endpoint.mean, endpoint.std).tolist()
    body = copy.deepcopy(endpoint.request.fields)
    *sections, last = endpoint.request.images.split(".")
    target = body
    for section in sections:
        target = target.setdefault(section, {})
    target[last] = values[0] if endpoint.request.single else values
    return body


def read_scores(answer: Any, where: JsonAnswer, kind: Scores, rows: int, *, single: bool = False) -> NDArray[Any]:
    """The scores in an answer: [n, k], or labels [n].

    Raises:
        UnexpectedAnswer: they are not where the description says, or not one for each image.
    """
    steps = where.scores.split(".") if where.scores else []
    before, after = (steps[: steps.index(EACH)], steps[steps.index(EACH) + 1 :]) if EACH in steps else (steps, [])
    found = _at(answer, before, where.scores)
    each = [found] if single else found
    if not isinstance(each, list) or len(each) != rows:
        size = len(each) if isinstance(each, list) else "none"
        raise UnexpectedAnswer(f"expected a list of {rows} at '{where.scores}' of the answer, found {size}")
    values = [_row(_at(element, after, where.scores), where, kind) for element in each]
    try:
        scores = np.asarray(values)
    except ValueError:
        raise UnexpectedAnswer("the oracle's scores differ in number from image to image") from None
    if scores.dtype.kind not in "iuf":
        raise UnexpectedAnswer("the oracle's scores are not numbers")
    return scores


def _at(value: Any, steps: Sequence[str], path: str) -> Any:
    for step in steps:
        try:
            value = value[int(step)] if isinstance(value, list) else value[step]
        except (LookupError, ValueError, TypeError):
            raise UnexpectedAnswer(f"the answer has nothing at '{path}' ('{step}')") from None
    return value


def _row(found: Any, where: JsonAnswer, kind: Scores) -> Any:
    """One image's scores in the classes' order, or its label's number."""
    if where.labels is None:
        return found
    if kind == "label":
        if found not in where.labels:
            raise UnexpectedAnswer("the oracle sent a label that is not among answer.labels")
        return where.labels.index(found)
    if isinstance(found, list) and found and isinstance(found[0], dict):
        try:
            found = {each[where.label]: each[where.score] for each in found}
        except (LookupError, TypeError):
            raise UnexpectedAnswer(
                f"the oracle's scores are not objects of '{where.label}' and '{where.score}'"
            ) from None
    if isinstance(found, dict):
        missing = [label for label in where.labels if label not in found]
        if missing:
            raise UnexpectedAnswer(f"the oracle's answer leaves out classes, such as '{missing[0]}': ask it for all")
        return [found[label] for label in where.labels]
    return found
