"""Every answer a run got, kept so that the run can be had again without an oracle: `answers.bin`.

An append-only file of records, little-endian:

    prefix   4 bytes b"ZOA1", then four uint32: length of the header, length of the payload, CRC-32 of the header,
             CRC-32 of the 16 bytes before
    header   JSON: what the oracle said of itself, or what an answer is (key, rows, classes, the payload's SHA-256, and
             the queries that the run had paid by then)
    payload  an answer's scores, float32 [rows, classes], row-major

A kill can only leave the beginning of a record at the end of the file; it is dropped when the file is next opened to be
added to. Anything else that does not fit is damage, and says so. The lengths have a checksum of their own, so that a
damaged length is not taken for a record that was cut off. An answer recorded twice counts as it was recorded last: that
is the one which the run, killed in between, went on with.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, NonNegativeInt, TypeAdapter, ValidationError

from defender_client import request_key
from defender_client.oracle import OracleInfo
from defender_client.query_log import QueryLog, log_files
from defender_client.questions import Question
from defender_client.request_key import RequestKey

ANSWERS_FILE = "answers.bin"

_MAGIC = b"ZOA1"
_LENGTHS = struct.Struct("<4sIII")
_CHECK = struct.Struct("<I")
_PREFIX_BYTES = _LENGTHS.size + _CHECK.size
_FLOAT32 = np.dtype("<f4")


class RecordingError(ValueError):
    """A recording that cannot be used."""


class RecordingMissing(RecordingError):
    """The run was not recorded."""


class RecordingDamaged(RecordingError):
    """Bytes of the recording are not those that were written."""


class NotRecorded(RecordingError):
    """The recording has no answer to this request."""


class _OracleHeader(BaseModel):
    """What the oracle said of itself, from here on."""

    kind: Literal["oracle"] = "oracle"
    info: OracleInfo


class _AnswerHeader(BaseModel):
    kind: Literal["answer"] = "answer"
    key: str
    rows: NonNegativeInt
    classes: NonNegativeInt
    sha256: str
    cost: NonNegativeInt


_Header = Annotated[_OracleHeader | _AnswerHeader, Field(discriminator="kind")]
_HEADERS: TypeAdapter[_OracleHeader | _AnswerHeader] = TypeAdapter(_Header)


@dataclass(frozen=True)
class RecordedAnswer:
    """Where an answer stands in the file, and what it is.

    Attributes:
        key: the Idempotency-Key it was bought under.
        rows, classes: shape of its scores.
        cost: queries that the recorded run had paid in all, this answer included.
        oracle: what the oracle said of itself when it gave this answer.
        offset: of its scores in the file, in bytes.
        sha256: of those bytes.
    """

    key: RequestKey
    rows: int
    classes: int
    cost: int
    oracle: OracleInfo
    offset: int
    sha256: str


class Recorder:
    """Adds to a run's recording; a record that a kill cut off is dropped first. Several threads may use it.

    Raises:
        RecordingDamaged: the file is not as it was written.
    """

    def __init__(self, path: Path) -> None:
        self._described: OracleInfo | None = None
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("ab+")
        try:
            whole = 0
            for header, _, end in _records(self._file, path):
                whole = end
                if isinstance(header, _OracleHeader):
                    self._described = header.info
            self._file.truncate(whole)
        except BaseException:
            self._file.close()
            raise

    def describe(self, info: OracleInfo) -> None:
        """Keep what the oracle says of itself, if it is not what it said before."""
        with self._lock:
            if info != self._described:
                self._append(_OracleHeader(info=info), b"")
                self._described = info

    def keep(self, key: str, scores: NDArray[np.float32], cost: int) -> RecordedAnswer | None:
        """Keep an answer: scores [n, k], and the queries that the run has paid in all, these included.

        Returns where it stands, if the oracle was described.
        """
        payload = np.ascontiguousarray(scores, _FLOAT32).tobytes()
        rows, classes = scores.shape
        sha256 = hashlib.sha256(payload).hexdigest()
        with self._lock:
            end = self._append(_AnswerHeader(key=key, rows=rows, classes=classes, sha256=sha256, cost=cost), payload)
            if self._described is None:
                return None
            place = end - len(payload)
            return RecordedAnswer(RequestKey.parse(key), rows, classes, cost, self._described, place, sha256)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def _append(self, header: BaseModel, payload: bytes) -> int:
        """Add a record; returns where it ends."""
        head = header.model_dump_json().encode()
        lengths = _LENGTHS.pack(_MAGIC, len(head), len(payload), zlib.crc32(head))
        with self._lock:
            self._file.write(lengths + _CHECK.pack(zlib.crc32(lengths)) + head + payload)
            # To the operating system: it survives this process, which is what can be killed.
            self._file.flush()
            return self._file.tell()


class Recording:
    """A run's recording, to be read: answers are found by an index and read one by one, by several threads if need be.

    Args:
        run: the directory of the run that was recorded.

    Raises:
        RecordingMissing: it was not.
        RecordingDamaged: the file is not as it was written.
    """

    def __init__(self, run: Path) -> None:
        self.run, self._path = run, run / ANSWERS_FILE
        self._answers: dict[str, dict[str, RecordedAnswer]] = {}  # by label, then by digest, the newest last
        info: OracleInfo | None = None
        try:
            self._file: IO[bytes] = self._path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            raise RecordingMissing(
                f"{run} has no {ANSWERS_FILE}: it was not recorded (give --record to `train` and `certify`)"
            ) from None
        try:
            for header, offset, _ in _records(self._file, self._path):
                if isinstance(header, _OracleHeader):
                    info = header.info
                elif info is not None:
                    self._index(header, info, offset)
                else:
                    raise RecordingDamaged(f"{self._path} is damaged: it does not begin with what the oracle is")
        except BaseException:
            self._file.close()
            raise
        if info is None:
            self._file.close()
            raise RecordingMissing(f"{self._path} is empty: the run was killed before the oracle said anything")
        self.info = info

    def _index(self, header: _AnswerHeader, info: OracleInfo, offset: int) -> None:
        key = RequestKey.parse(header.key)
        self.add(RecordedAnswer(key, header.rows, header.classes, header.cost, info, offset, header.sha256))

    def add(self, answer: RecordedAnswer | None) -> None:
        """An answer that was recorded since this was opened."""
        if answer is not None:
            by_digest = self._answers.setdefault(answer.key.label, {})
            by_digest.pop(answer.key.digest, None)
            by_digest[answer.key.digest] = answer

    def find(self, question: Question, label: str) -> RecordedAnswer | None:
        """The newest answer under `label` to the first of these rows, however many it took; None if there is none."""
        digests: dict[int, str] = {}
        for answer in self.answers(label):
            if answer.rows > len(question) or (answer.rows == 0 and len(question)):
                continue
            if answer.rows not in digests:
                first = question if answer.rows == len(question) else question.take(0, answer.rows)
                digests[answer.rows] = request_key.digest(first.encode(answer.oracle.output_name))
            if digests[answer.rows] == answer.key.digest:
                return answer
        return None

    def answers(self, label: str) -> list[RecordedAnswer]:
        """The answers recorded under a label, the newest first."""
        return list(reversed(self._answers.get(label, {}).values()))

    def keys(self) -> list[str]:
        """The key of every answer."""
        return [str(answer.key) for answers in self._answers.values() for answer in answers.values()]

    def read(self, answer: RecordedAnswer) -> NDArray[np.float32]:
        """An answer's scores [rows, classes]; RecordingDamaged if they are not what was written."""
        payload = os.pread(self._file.fileno(), answer.rows * answer.classes * _FLOAT32.itemsize, answer.offset)
        if hashlib.sha256(payload).hexdigest() != answer.sha256:
            raise RecordingDamaged(f"{self._path} is damaged: the answer to {answer.key} is not what was recorded")
        return np.frombuffer(payload, _FLOAT32).reshape(answer.rows, answer.classes).astype(np.float32)

    def unrecorded(self) -> Counter[str]:
        """Requests by purpose that the run's own log knows as answered and this recording does not have."""
        missing: Counter[str] = Counter()
        if log_files(self.run):
            for request in QueryLog.of_run(self.run).requests.values():
                key = RequestKey.parse(request.key).first
                if (
                    request.charged is not None
                    and not request.lost
                    and key.digest not in self._answers.get(key.label, {})
                ):
                    missing[request.purpose] += 1
        return missing

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _records(file: IO[bytes], path: Path) -> Iterator[tuple[_OracleHeader | _AnswerHeader, int, int]]:
    """Each whole record's header, the offset of its payload, and where it ends; payloads are not read."""
    size = file.seek(0, 2)
    start = 0
    while start + _PREFIX_BYTES <= size:
        file.seek(start)
        prefix = file.read(_PREFIX_BYTES)
        magic, head_bytes, payload_bytes, head_crc = _LENGTHS.unpack_from(prefix)
        (check,) = _CHECK.unpack_from(prefix, _LENGTHS.size)
        if magic != _MAGIC or check != zlib.crc32(prefix[: _LENGTHS.size]):
            raise RecordingDamaged(f"{path} is damaged at byte {start}: no record begins there")
        offset = start + _PREFIX_BYTES + head_bytes
        end = offset + payload_bytes
        if end > size:
            return  # cut off by a kill
        head = file.read(head_bytes)
        try:
            if zlib.crc32(head) != head_crc:
                raise ValueError
            header = _HEADERS.validate_json(head)
        except (ValidationError, ValueError):
            raise RecordingDamaged(f"{path} is damaged at byte {start}: the record's header cannot be read") from None
        if isinstance(header, _AnswerHeader) and payload_bytes != header.rows * header.classes * _FLOAT32.itemsize:
            raise RecordingDamaged(f"{path} is damaged at byte {start}: {payload_bytes} bytes are not its scores")
        yield header, offset, end
        start = end
