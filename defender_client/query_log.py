"""The client's own account: one JSON line before a request is sent, one when its answer is read.

The first line is written before anything can be charged, so that after a kill at any moment every charge on the
server's ledger is explained by a line here. A line cut off by a kill was not followed by a request, and is dropped.

Where several ranks make a run (`ranks`), each has a log of its own: `queries.jsonl` is rank 0's, `queries-rank1.jsonl`
that of rank 1. `QueryLog.of_run` reads them as one.

Two more kinds of line: a batch limit that the server's refusals taught (`max_rows`), so that a run that is started
again splits its batches as before; and an answer taken from a recording (`replayed`), sent nowhere and free.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from shared.wire.errors import TooLarge

LOG_FILE = "queries.jsonl"
_RANK_FILES = "queries-rank*.jsonl"


class LogDamaged(ValueError):
    """A whole line of the log is not one that was written: somebody changed the file."""


@dataclass
class LoggedRequest:
    """A request as the client knows it. `charged` is None while no answer was read; a replay is charged 0.

    `receipt` is the last Query-Receipt as it came, or None: its form is the server's own, and a proxy may
    strip it. `lost`: it is paid, and no answer will ever be had for it (of a foreign oracle).
    """

    key: str
    purpose: str
    rows: int
    charged: int | None = None
    refused: str | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    receipt: str | None = None
    lost: bool = False


@dataclass(frozen=True)
class ReplayedAnswer:
    """An answer taken from a recording; `cost` is what the recorded run had paid in all when it got it, in queries."""

    key: str
    purpose: str
    rows: int
    cost: int


def log_file(rank: int) -> str:
    """The name of a rank's log in the run's directory."""
    return f"queries-rank{rank}.jsonl" if rank else LOG_FILE


def log_files(run: Path) -> list[Path]:
    """The logs that a run's directory has, rank 0's first."""
    first = run / LOG_FILE
    return [*([first] if first.exists() else []), *sorted(run.glob(_RANK_FILES), key=_rank_of)]


def _rank_of(path: Path) -> int:
    number = path.stem.removeprefix("queries-rank")
    return int(number) if number.isdecimal() else 0


class QueryLog:
    """Append-only log of requests, kept in `path`; `path=None` keeps it in memory only.

    Several threads may use it; its lines then stand in the order in which things happened.

    Args:
        path: the file.
        beside: the logs of the run's other ranks, which may be written meanwhile: what one of them was charged for
            before now is not counted here again, should this one ask the same.
        inherited: those among them that nobody writes any more, of ranks that the run had before: what they were
            charged is counted here.
    """

    def __init__(self, path: Path | None, beside: Sequence[Path] = (), inherited: Sequence[Path] = ()) -> None:
        self._path = path
        self._elsewhere: set[str] = set()
        self._file: IO[str] | None = None
        self._lock = threading.RLock()
        self.requests: dict[str, LoggedRequest] = {}
        self.charged: Counter[str] = Counter()  # queries by purpose
        self.max_rows: int | None = None  # of a batch, as refusals taught it
        self.replays: dict[str, ReplayedAnswer] = {}
        self._asked: dict[str, str] = {}  # RUN/LABEL: the key last asked under it
        for other in beside:
            known = QueryLog.read(other)
            self._elsewhere |= {key for key, request in known.requests.items() if request.charged}
            if other in inherited:
                self.charged += known.charged
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            whole = self._load(path)
            if whole < path.stat().st_size:
                with path.open("rb+") as torn:
                    torn.truncate(whole)
        self._file = path.open("a", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> QueryLog:
        """A log to look at: the file is neither changed nor added to."""
        log = cls(None)
        log._load(path)
        return log

    @classmethod
    def of_run(cls, run: Path) -> QueryLog:
        """All that a run's directory has of logs, as one to look at; FileNotFoundError where it has none."""
        first, *others = log_files(run) or [run / LOG_FILE]
        log = cls.read(first)
        for path in others:
            log._include(cls.read(path))
        return log

    def _include(self, other: QueryLog) -> None:
        for key, request in other.requests.items():
            known = self.requests.get(key)
            self.requests[key] = request if known is None else _both(known, request)
        self.charged += other.charged
        self.replays |= other.replays
        limits = [limit for limit in (self.max_rows, other.max_rows) if limit is not None]
        self.max_rows = min(limits, default=None)

    def sending(self, key: str, purpose: str, rows: int) -> None:
        """A request is about to be sent (for the first time or again)."""
        with self._lock:
            if key not in self.requests or self.requests[key].refused:
                self._append({"key": key, "purpose": purpose, "rows": rows, "at": datetime.now(UTC).isoformat()})

    def answered(self, key: str, charged: int, *, receipt: str | None, bytes_up: int, bytes_down: int) -> None:
        """The answer of a request was read; `charged` is the server's Query-Charge, 0 for a replay.

        A replay of a charge whose answer was lost settles it: the rows it had been charged are counted now.
        """
        with self._lock:
            total = self._settled(key, charged)
            self._append({"key": key, "charged": total, "receipt": receipt, "up": bytes_up, "down": bytes_down})

    def lost(self, key: str, rows: int, *, receipt: str | None, bytes_up: int) -> None:
        """A request was paid, and its answer never came or could not be used; asked again, it is another request."""
        self._append({"key": key, "charged": rows, "receipt": receipt, "up": bytes_up, "down": 0, "lost": True})

    def total_after(self, key: str, charged: int) -> int:
        """What `total` will be once `answered` was told of this charge."""
        with self._lock:
            return self.total - (self.requests[key].charged or 0) + self._settled(key, charged)

    def _settled(self, key: str, charged: int) -> int:
        """Queries charged for a request in all, with this answer's charge."""
        known = self.requests[key]
        if charged == 0:
            rows = 0 if key in self._elsewhere else known.rows
            return rows if known.charged is None else known.charged
        return (known.charged or 0) + charged

    def refused(self, key: str, code: str) -> None:
        """The request was refused: nothing was charged."""
        self._append({"key": key, "refused": code})

    def learn_max_rows(self, rows: int) -> None:
        """The server refused a larger batch; a limit above one that is known already teaches nothing."""
        with self._lock:
            if self.max_rows is None or rows < self.max_rows:
                self._append({"max_rows": rows, "at": datetime.now(UTC).isoformat()})

    def replayed(self, answer: ReplayedAnswer) -> None:
        """An answer was taken from a recording."""
        self._append({"replayed": asdict(answer)})

    def in_doubt(self, key: str) -> bool:
        """Whether a request was sent and its answer never came: it may have been charged."""
        with self._lock:
            known = self.requests.get(key)
            return known is not None and known.charged is None and not known.refused

    def last_asked(self, run_and_label: str) -> LoggedRequest | None:
        """The request last sent under RUN/LABEL; None if there is none, or if it was refused as too large."""
        with self._lock:
            key = self._asked.get(run_and_label)
            if key is None or self.requests[key].refused == TooLarge.code:
                return None
            return self.requests[key]

    @property
    def total(self) -> int:
        """Queries charged in all answered requests."""
        with self._lock:
            return self.charged.total()

    @property
    def replayed_rows(self) -> int:
        """Rows answered from a recording, at no query."""
        with self._lock:
            return sum(answer.rows for answer in self.replays.values())

    @property
    def unanswered(self) -> list[LoggedRequest]:
        """Requests sent whose answer never came: the server may or may not have charged them."""
        with self._lock:
            return [request for request in self.requests.values() if request.charged is None and not request.refused]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _load(self, path: Path) -> int:
        """Apply the file's whole lines; returns where the last one ends."""
        whole = 0
        for number, (raw, end) in enumerate(_lines(path), start=1):
            try:
                self._apply(json.loads(raw))
            except (ValueError, KeyError, TypeError) as error:
                raise LogDamaged(
                    f"{path} is damaged in line {number} ({type(error).__name__}: {error}): the account of this run "
                    "cannot be read"
                ) from None
            whole = end
        return whole

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock:
            self._apply(line)
            if self._file is not None:
                self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
                # To the operating system: it survives this process, which is what can be killed.
                self._file.flush()

    def _apply(self, line: dict[str, Any]) -> None:
        if "max_rows" in line:
            self.max_rows = _positive(line["max_rows"])
            return
        if "replayed" in line:
            answer = ReplayedAnswer(**line["replayed"])
            self.replays[answer.key] = answer
            return
        key = line["key"]
        if "rows" in line:
            self._asked[key.rpartition("/")[0]] = key
            # Announced again after a refusal: what an earlier answer was charged for stays.
            known = self.requests.setdefault(key, LoggedRequest(key, line["purpose"], line["rows"]))
            known.refused = None
            return
        request = self.requests[key]
        if "refused" in line:
            request.refused = line["refused"]
            return
        charged, up, down = line["charged"], line["up"], line["down"]
        self.charged[request.purpose] += charged - (request.charged or 0)
        request.charged = charged
        request.receipt = line["receipt"] or request.receipt
        request.lost = line.get("lost") is True
        request.bytes_up += up
        request.bytes_down += down


def _both(first: LoggedRequest, second: LoggedRequest) -> LoggedRequest:
    """One request that two ranks have made, the second of them where the run was resumed with other shares."""
    charges = [request.charged for request in (first, second) if request.charged is not None]
    refused = first.refused and second.refused
    return replace(
        first,
        charged=sum(charges) if charges else None,
        refused=refused if not charges else None,
        bytes_up=first.bytes_up + second.bytes_up,
        bytes_down=first.bytes_down + second.bytes_down,
        receipt=second.receipt or first.receipt,
    )


def _positive(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"not a number of rows: {value!r}")
    return value


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Whole lines of the log with the offset at which each ends."""
    end = 0
    with path.open("rb") as log:
        for raw in log:
            if not raw.endswith(b"\n"):
                return
            end += len(raw)
            yield raw, end
