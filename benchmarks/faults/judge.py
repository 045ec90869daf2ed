"""The last word: the exported ledger against everything that anybody observed.

Nothing of the server's tables or code is asked, but for the export and `ledger verify` themselves: the rules are
replayed here once more, and every answer that passed the proxy, whether or not a client received it, is looked up.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.work import ANSWERS_FILE
from defender_client.query_log import LOG_FILE, QueryLog
from shared.audit import export
from shared.audit.chain import Entry
from shared.audit.signatures import Receipt, SignatureInvalid

_EXAMPLES = 3
_UNSETTLED = frozenset({None, 500, 502, 503, 504})  # after these nobody knows whether the request was charged
Key = tuple[str, str]  # a client's name and its Idempotency-Key


@dataclass
class Verdict:
    """What must be zero, with examples of what was found, and what is only counted.

    Attributes:
        wrong: each thing that may not happen, and the findings of it.
        counted: what happened.
    """

    wrong: dict[str, list[str]] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        return not any(self.wrong.values())

    def lines(self) -> Iterator[str]:
        """As a table; what is wrong with a few examples below it."""
        for what, count in self.counted.items():
            yield f"{what:<66}{count:>10,}"
        for what, found in self.wrong.items():
            yield f"{what:<66}{len(found):>10,}{'   WRONG' if found else ''}"
            yield from (f"    {example}" for example in found[:_EXAMPLES])


@dataclass(frozen=True)
class Evidence:
    """What the judge reads.

    Attributes:
        exported: the lines of `oracle-server ledger export`.
        public_key: the key to trust, noted before the first fault; 32 bytes.
        exchanges: queries as the proxy saw them, see `proxy`.
        races: the racers' outcomes, see `kinds`.
        runs: the defenders' run directories, by the clients' names.
    """

    exported: Iterable[bytes]
    public_key: bytes
    exchanges: list[dict[str, Any]]
    races: list[dict[str, Any]]
    runs: dict[str, list[Path]]


class _Ledger:
    """The account, replayed from the entries alone."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = list(entries)
        self.names: dict[int, str] = {}
        self.over_budget: list[str] = []
        self.out_of_order: list[str] = []
        self.open: dict[int, Entry] = {}
        self.charges: defaultdict[Key, list[Entry]] = defaultdict(list)
        self.kinds: Counter[str] = Counter()
        self.released: Counter[str] = Counter()  # by what the note says, without the server's id
        self.bodies: defaultdict[Key, set[str | None]] = defaultdict(set)  # that each key was reserved for
        # The most that a client had spent while its budget was so much.
        self.spent_under: dict[tuple[str, int], int] = {}
        self._budget: Counter[int] = Counter()
        self._spent: Counter[int] = Counter()
        self._held: Counter[int] = Counter()
        for entry in self.entries:
            self._take(entry)

    def _take(self, entry: Entry) -> None:
        who = entry.client_id
        self.kinds[entry.kind] += 1
        match entry.kind:
            case "client":
                self.names[who] = json.loads(entry.note or "{}")["name"]
            case "budget":
                self._budget[who] = entry.amount or 0
            case "reserve":
                self.open[entry.seq] = entry
                self.bodies[self.names[who], entry.idempotency_key or ""].add(entry.body_sha256)
                self._held[who] += entry.rows
            case "charge" | "release":
                reserved = self.open.pop(entry.refers_to or 0, None)
                fields = ("client_id", "rows", "idempotency_key", "body_sha256")
                if reserved is None or any(getattr(reserved, name) != getattr(entry, name) for name in fields):
                    self.out_of_order.append(f"entry {entry.seq} settles {entry.refers_to}, which was not open so")
                self._held[who] -= entry.rows
                if entry.kind == "release":
                    self.released[re.sub(r"server \w+", "its server", entry.note or "")] += 1
                if entry.kind == "charge":
                    self._spent[who] += entry.rows
                    self.charges[self.names[who], entry.idempotency_key or ""].append(entry)
            case other:
                self.out_of_order.append(f"entry {entry.seq} is a {other}, which nobody asked for")
        name = self.names.get(who, "")
        if self._spent[who] + self._held[who] > self._budget[who]:
            self.over_budget.append(
                f"entry {entry.seq}: '{name}' has spent {self._spent[who]} and holds {self._held[who]} of "
                f"{self._budget[who]}"
            )
        self.spent_under[name, self._budget[who]] = self._spent[who]


def judge(evidence: Evidence) -> Verdict:
    """Compare; `Verdict.wrong` names all that was looked for, found or not."""
    examined = export.examine(evidence.exported, evidence.public_key)
    ledger = _Ledger(examined.shown[seq] for seq in sorted(examined.shown))
    verdict = Verdict()
    wrong = verdict.wrong
    wrong["findings in the exported ledger"] = list(examined.findings)
    wrong["entries that settle no open reservation"] = ledger.out_of_order
    wrong["queries admitted over budget (entries)"] = ledger.over_budget
    wrong["reservations left open after the last sweep"] = [f"entry {seq}" for seq in ledger.open]
    wrong["keys charged more than once"] = [
        f"{name} {key}: entries {[entry.seq for entry in charges]}"
        for (name, key), charges in ledger.charges.items()
        if len(charges) > 1
    ]
    answered = _answers(evidence, examined.hashes, ledger, verdict)
    _refusals(evidence, ledger, wrong)
    _races(evidence, ledger, wrong)
    logged = _logs(evidence, ledger, wrong)
    asked = {(each["account"], each["key"]) for each in evidence.exchanges} | logged
    wrong["charges that nobody asked for"] = [
        f"{name} {key}" for name, key in ledger.charges if (name, key) not in asked
    ]
    wrong["answers without a charge"] = [f"{name} {key}" for name, key in sorted(answered - ledger.charges.keys())]
    unseen = ledger.charges.keys() - answered
    verdict.counted |= {
        "entries in the ledger": len(ledger.entries),
        "reservations": ledger.kinds["reserve"],
        "releases": ledger.kinds["release"],
        "distinct keys asked for": len(asked),
        "charges expected (distinct keys that were answered)": len(answered),
        "charges found for them": sum(len(ledger.charges[key]) for key in answered if key in ledger.charges),
        "charges found for keys whose answer nobody saw (allowed, once)": sum(len(ledger.charges[k]) for k in unseen),
        "queries charged (rows)": sum(entry.rows for charges in ledger.charges.values() for entry in charges),
    }
    verdict.counted |= {f"released because {note}": count for note, count in sorted(ledger.released.items())}
    statuses = Counter(
        f"{each['status'] or 'no answer'} {each.get('code') or ''}".strip() for each in evidence.exchanges
    )
    verdict.counted |= {f"exchanges: {status}": count for status, count in sorted(statuses.items())}
    return verdict


def _answers(evidence: Evidence, hashes: dict[int, str], ledger: _Ledger, verdict: Verdict) -> set[Key]:
    """Every answer has the one charge it names; answers for a key are all the same. Returns the keys answered."""
    answers: defaultdict[Key, set[str]] = defaultdict(set)
    paid_by: defaultdict[Key, set[int]] = defaultdict(set)
    said_charged: Counter[Key] = Counter()
    receipts, early, not_asked = [], [], 0
    by_seq = {entry.seq: entry for entry in ledger.entries}
    checked: dict[str, str | None] = {}
    for seen in [each for each in evidence.exchanges if each["status"] == 200]:
        key = (seen["account"], seen["key"])
        answers[key].add(seen["answer"])
        if seen["charge"] != 0:
            said_charged[key] += 1
        text = seen["receipt"]
        if text not in checked:
            checked[text] = _receipt_problem(text, evidence.public_key, hashes, by_seq)
        if (problem := checked[text]) is not None:
            receipts.append(f"{key}: {problem}")
            continue
        entry = Receipt.parse(text).entry
        paid_by[key].add(entry.seq)
        if (ledger.names[entry.client_id], entry.idempotency_key, entry.body_sha256) != (*key, seen["body"]):
            receipts.append(f"{key}: the receipt is for another request, entry {entry.seq}")
        if seen["charge"] not in (0, entry.rows):
            receipts.append(f"{key}: Query-Charge {seen['charge']}, and the receipt says {entry.rows}")
        if seen["stands"] is False:
            early.append(f"{key}: entry {entry.seq} was not in the database when its answer was on its way")
        not_asked += seen["stands"] is None
    for outcome in (outcome for race in evidence.races for outcome in race["outcomes"]):
        if outcome["status"] == 200:
            answers["racers" if race_of_one_key(outcome) else "last", outcome["key"]].add(outcome["answer"])
    wrong = verdict.wrong
    wrong["receipts that do not match the ledger"] = receipts
    wrong["answers sent before their charge was in the database"] = early
    wrong["keys answered by more than one charge"] = [f"{key}" for key, seqs in paid_by.items() if len(seqs) > 1]
    wrong["keys that two answers said were charged"] = [f"{key}" for key, times in said_charged.items() if times > 1]
    wrong["keys with answers that differ (logits, bit by bit)"] = [
        *(f"{key}" for key, bodies in answers.items() if len(bodies) > 1),
        *_steps_that_differ(evidence.runs),
    ]
    verdict.counted["charges whose own answer never left the server, told to a retry"] = sum(
        1 for key in answers if key not in said_charged and key in ledger.charges
    )
    verdict.counted["answers whose charge the database was asked for at once"] = (
        sum(1 for each in evidence.exchanges if each["status"] == 200) - not_asked
    )
    return set(answers)


def race_of_one_key(outcome: dict[str, Any]) -> bool:
    """Whether it is of the client 'racers', and not of 'last'; see `kinds`."""
    return not outcome["key"].startswith("last-")


def _receipt_problem(text: str, public_key: bytes, hashes: dict[int, str], entries: dict[int, Entry]) -> str | None:
    try:
        receipt = Receipt.parse(text)
        receipt.verify(public_key)
    except SignatureInvalid as invalid:
        return str(invalid)
    seq = receipt.entry.seq
    if entries.get(seq) != receipt.entry or hashes.get(seq) != receipt.hash:
        return f"entry {seq} of the ledger is not what the receipt says"
    return None if receipt.entry.kind == "charge" else f"entry {seq} is no charge"


def _steps_that_differ(runs: dict[str, list[Path]]) -> Iterator[str]:
    for run in (run for several in runs.values() for run in several):
        answers: defaultdict[int, set[str]] = defaultdict(set)
        if (run / ANSWERS_FILE).exists():
            for line in read_lines(run / ANSWERS_FILE):
                answers[line["step"]].add(line["answer"])
        yield from (f"{run.name}, step {step}" for step, several in answers.items() if len(several) > 1)


def _refusals(evidence: Evidence, ledger: _Ledger, wrong: dict[str, list[str]]) -> None:
    """What was refused is not charged; what could be paid is not refused; nothing failed inside."""
    statuses: defaultdict[tuple[Key, str], set[int | None]] = defaultdict(set)
    internal, payable, after_503 = [], [], []
    for seen in evidence.exchanges:
        key = (seen["account"], seen["key"])
        statuses[key, seen["body"]].add(seen["status"])
        if seen["status"] is not None and seen["status"] >= 500 and seen["code"] != "unavailable":
            internal.append(f"{key}: {seen['status']} {seen['code']} {seen['detail']}")
        if seen.get("code") == "budget-exhausted":
            spent = ledger.spent_under.get((seen["account"], seen["budget"]))
            if spent is None or spent + seen["requested"] <= seen["budget"]:
                payable.append(
                    f"{key}: {seen['requested']} of {seen['budget']}, of which {spent} were spent in the end"
                )
    charged_bodies = {(key, entry.body_sha256) for key, charges in ledger.charges.items() for entry in charges}
    refused = [(key, body) for (key, body), told in statuses.items() if not told & {200, *_UNSETTLED}]
    after_503 = [
        (key, body) for (key, body), told in statuses.items() if 503 in told and not told & {200, None, 500, 502, 504}
    ]
    wrong["refused requests that were charged"] = [f"{each}" for each in refused if each in charged_bodies]
    wrong["requests told 503 and nothing else that were charged"] = [f"{e}" for e in after_503 if e in charged_bodies]
    wrong["requests refused that the budget covered"] = payable
    wrong["answers 5xx other than 503"] = internal


def _races(evidence: Evidence, ledger: _Ledger, wrong: dict[str, list[str]]) -> None:
    """All are told something in the end, and what each is told agrees with the others and with the ledger.

    One key, one body: all are answered, and alike. Many keys: all are answered. One key, two bodies: one body is
    answered, and whoever is told of a conflict had another body than one that the key had been reserved for. The last
    queries: answered, or refused.
    """
    found = []
    for race in evidence.races:
        told = {
            (each["status"], each["code"], each["body"], each["answer"], each["receipt"]) for each in race["outcomes"]
        }
        answered = {each for each in told if each[0] == 200}
        refused = told - answered
        bodies = ledger.bodies["racers", race["outcomes"][0]["key"]]
        conflict = (422, "idempotency-conflict")
        right = {
            "same": len(answered) == 1 and not refused,
            "many": not refused,
            "bodies": len(answered) <= 1 and all(each[:2] == conflict and bodies - {each[2]} for each in refused),
            "last": all(each[:2] == (403, "budget-exhausted") for each in refused),
        }
        if not right[race["kind"]]:
            statuses = sorted((each["status"] or 0, each["code"] or "") for each in race["outcomes"])
            found.append(f"{race['kind']} {race['outcomes'][0]['key']}: {statuses}")
    wrong["races that ended otherwise than they should"] = found


def _logs(evidence: Evidence, ledger: _Ledger, wrong: dict[str, list[str]]) -> set[Key]:
    """The defenders' own logs agree with the ledger, request by request. Returns their keys."""
    found, keys = [], set()
    clients = evidence.runs.keys()
    for client, runs in evidence.runs.items():
        for run in runs:
            for key, request in QueryLog.read(run / LOG_FILE).requests.items():
                keys.add((client, key))
                charged = sum(entry.rows for entry in ledger.charges.get((client, key), ()))
                if request.charged is not None:
                    expected = {request.charged}
                else:
                    expected = {0} if request.refused else {0, request.rows}
                if charged not in expected:
                    found.append(f"{run.name} {key}: the log says {request}, the ledger charged {charged}")
    unknown = [key for key in ledger.charges if key[0] in clients and key not in keys]
    wrong["differences between the defenders' logs and the ledger"] = found + [f"{key} is in no log" for key in unknown]
    return keys


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON objects, one a line."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
