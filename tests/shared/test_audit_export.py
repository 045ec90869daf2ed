"""An exported ledger in hostile hands: of 8,000 random tamperings none goes unnoticed, nor do those a thief would try.

With the 2,000 of `tests/oracle_server/test_verification.py` they are the 10,000 that this project promises.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from audit_support import Written, small

from shared.audit.export import Examined, NotALedger, examine
from shared.audit.history import contradictions
from shared.audit.signatures import Head

TAMPERINGS = 8_000
KEY = small().public_key
OTHER = small("fedcba9876543210").lines()
Lines = list[bytes]


def examined(lines: Lines) -> Examined:
    return examine(lines, KEY)


def found(lines: Lines) -> bool:
    """Whether something is wrong with a file of these bytes."""
    try:
        return bool(examine(io.BytesIO(b"".join(lines)), KEY).findings)
    except NotALedger:
        return True


def spelled(fields: object) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def rehashed(lines: Lines) -> Lines:
    """Every hash made anew, and the end with them: all that can be done without the key."""
    rows = [json.loads(line) for line in lines]
    value = hashlib.sha256(b"\x02" + rows[0]["ledger"].encode() + bytes.fromhex(rows[0]["public_key"])).digest()
    seq = 0
    for row in rows[1:-1]:
        text = spelled(row["entry"]).strip() if "entry" in row else b""
        leaf = hashlib.sha256(b"\x00" + text).digest() if text else bytes.fromhex(row["leaf"])
        value = hashlib.sha256(b"\x01" + value + leaf).digest()
        row["hash"], seq = value.hex(), row["entry"]["seq"] if text else row["seq"]
    rows[-1]["head"] |= {"hash": value.hex(), "seq": seq}
    return [spelled(row) for row in rows]


def entry(lines: Lines, number: int, **changes: object) -> Lines:
    """An entry's line with other fields."""
    row = json.loads(lines[number])
    return [*lines[:number], spelled(row | {"entry": row["entry"] | changes}), *lines[number + 1 :]]


# --- a whole file ----------------------------------------------------------------------------------------------------


def test_a_file_as_it_was_exported() -> None:
    written = small()
    result = examined(written.lines())
    assert result.findings == ()
    assert (result.ledger, result.client, result.entries, result.hidden) == (written.ledger, None, 15, 0)
    assert result.head == written.head
    assert result.shown == {each.seq: each for each in written.entries}
    assert result.hashes == {seq: value.hex() for seq, value in enumerate(written.hashes)}
    assert {a.name: (a.spent, a.held, a.budget) for a in result.accounts.clients.values()} == {
        "ann": (6, 5, 30),
        "bob": (3, 0, 20),
    }


def test_a_file_of_one_client_shows_the_others_hashes_only() -> None:
    written = small()
    lines = written.lines(client=1)
    assert b"bob" not in b"".join(lines)
    result = examined(lines)
    assert result.findings == ()
    assert (result.client, result.entries, result.hidden) == (1, 15, 5)
    assert {each.client_id for each in result.shown.values()} == {1}
    assert [(a.name, a.spent, a.held) for a in result.accounts.clients.values()] == [("ann", 6, 5)]
    assert len(result.hashes) == 16


def test_an_empty_ledger() -> None:
    written = Written()
    assert examined(written.lines()).findings == ()
    assert found(written.lines()[:1])


# --- what a thief would try ------------------------------------------------------------------------------------------


def redacted(lines: Lines, number: int) -> Lines:
    row = json.loads(lines[number])
    leaf = hashlib.sha256(b"\x00" + spelled(row["entry"]).strip()).hexdigest()
    return [
        *lines[:number],
        spelled({"seq": row["entry"]["seq"], "leaf": leaf, "hash": row["hash"]}),
        *lines[number + 1 :],
    ]


def other_key(lines: Lines) -> Lines:
    """Everything right, and signed: with the thief's own key."""
    return small(seed=2).lines()


def older_end(lines: Lines) -> Lines:
    older = small()
    older.entries.pop()
    older.hashes.pop()
    return [*lines[:-1], older.lines()[-1]]


def first(lines: Lines, **changes: object) -> Lines:
    return [spelled(json.loads(lines[0]) | changes), *lines[1:]]


def last(lines: Lines, **changes: object) -> Lines:
    row = json.loads(lines[-1])
    return [*lines[:-1], spelled({"head": row["head"] | changes, "signature": row["signature"]})]


TRICKS: dict[str, Callable[[Lines], Lines]] = {
    "a charge made smaller, all hashes made anew": lambda lines: rehashed(entry(lines, 6, rows=1)),
    "a budget raised, all hashes made anew": lambda lines: rehashed(entry(lines, 2, amount=10**6)),
    "a charge deleted, all hashes made anew": lambda lines: rehashed([*lines[:6], *lines[7:]]),
    "a client moved to another account": lambda lines: rehashed(entry(lines, 6, client_id=2)),
    "an entry edited together with its hash": lambda lines: [
        *lines[:6],
        rehashed(entry(lines, 6, rows=1))[6],
        *lines[7:],
    ],
    "true for 1": lambda lines: entry(lines, 1, client_id=True),
    "1.0 for 1": lambda lines: entry(lines, 1, client_id=1.0),
    "a field more": lambda lines: entry(lines, 6, remark=""),
    "two entries' fields swapped": lambda lines: entry(entry(lines, 6, rows=3), 8, rows=4),
    "a space": lambda lines: [*lines[:6], lines[6].replace(b",", b", ", 1), *lines[7:]],
    "a name twice": lambda lines: [*lines[:6], lines[6].replace(b'{"amount"', b'{"amount":1,"amount"', 1), *lines[7:]],
    "names in another order": lambda lines: [
        *lines[:6],
        json.dumps(dict(reversed(json.loads(lines[6]).items())), separators=(",", ":")).encode() + b"\n",
        *lines[7:],
    ],
    "a letter escaped": lambda lines: [*lines[:6], lines[6].replace(b"charge", b"ch\\u0061rge"), *lines[7:]],
    "a carriage return": lambda lines: [*lines[:6], lines[6].replace(b"\n", b"\r\n"), *lines[7:]],
    "capital digits": lambda lines: [*lines[:6], lines[6].replace(b'"hash":"', b'"hash":"A', 1), *lines[7:]],
    "cut off at a line's end": lambda lines: lines[:-1],
    "cut off within the last line feed": lambda lines: [*lines[:-1], lines[-1].rstrip(b"\n")],
    "cut off after the first line": lambda lines: lines[:1],
    "empty": lambda lines: [],
    "the same file twice": lambda lines: [*lines, *lines],
    "an empty line at the end": lambda lines: [*lines, b"\n"],
    "an entry after the end": lambda lines: [*lines, lines[6]],
    "two ends": lambda lines: [*lines, lines[-1]],
    "another's key": other_key,
    "another ledger's end": lambda lines: [*lines[:-1], OTHER[-1]],
    "another ledger's end, under this one's name": lambda lines: last([*lines[:-1], OTHER[-1]], ledger=small().ledger),
    "another ledger's entries": lambda lines: [lines[0], *OTHER[1:]],
    "an older end": older_end,
    "a later time of the end": lambda lines: last(lines, at="later"),
    "true for the end's number": lambda lines: last(lines, seq=True),
    "an end of no hash": lambda lines: last(lines, hash=5),
    "another ledger's id": lambda lines: first(lines, ledger="fedcba9876543210"),
    "an id that is none": lambda lines: first(lines, ledger="\u00e9"),
    "an id that is no text": lambda lines: first(lines, ledger=5),
    "NaN for the key": lambda lines: [lines[0].replace(b'"public_key":"', b'"public_key":NaN,"x":"'), *lines[1:]],
    "a name more in the first line": lambda lines: first(lines, remark=""),
    "another format": lambda lines: first(lines, format="zo-defense-ledger/2"),
    "an entry hidden in a file that shows all": lambda lines: redacted(lines, 6),
    "an entry hidden, and the file said to be of one client": lambda lines: first(redacted(lines, 6), client=1),
    "one client's half of a payment hidden": lambda lines: redacted(small().lines(client=1), 5),
    "a hidden entry under another number": lambda lines: [
        line.replace(b'"seq":3}', b'"seq":4}') for line in small().lines(client=1)
    ],
    "a hidden entry numbered true": lambda lines: [
        line.replace(b'"seq":3}', b'"seq":true}') for line in small().lines(client=1)
    ],
    "nesting without end": lambda lines: [*lines[:6], b"[" * 100_000 + b"\n", *lines[7:]],
}


@pytest.mark.parametrize("trick", TRICKS.values(), ids=TRICKS.keys())
def test_tricks_are_seen(trick: Callable[[Lines], Lines]) -> None:
    lines = small().lines()
    tampered = trick(list(lines))
    assert tampered != lines
    assert found(tampered)


def test_what_is_said_of_an_edited_entry_names_it_and_no_other() -> None:
    assert examined(entry(small().lines(), 6, at="another time")).findings == (
        "entry 6: it, or one before it, is not what its hash was made of",
    )


def test_a_number_that_nobody_gave_is_missed_though_all_is_signed() -> None:
    """The holder of the key leaves an entry out and makes everything after it anew."""
    written = small()
    lines = written.lines()
    tampered = [json.loads(line) for line in rehashed([*lines[:13], *lines[14:]])]
    head = Head(**tampered[-1]["head"])
    tampered[-1] = {"head": asdict(head), "signature": written.signer.sign_head(head).signature}
    assert examined([spelled(row) for row in tampered]).findings == (
        "entry 14 stands after entry 12: entries are missing, or in another order",
    )


def test_an_unknown_key_proves_nothing() -> None:
    findings = examine(small().lines(), small(seed=2).public_key).findings
    assert any("names another public key" in finding for finding in findings)
    assert any(finding.startswith("the signed head: the signature was not made by this key") for finding in findings)


# --- 8,000 times at random -------------------------------------------------------------------------------------------

VALUES: list[Any] = [0, 1, 2, 5, -1, 10**20, True, None, 1.0, 0.5, "", "x", "charge", "release", "k1", [], {}]


def some_bytes(lines: Lines, draw: random.Random) -> Lines:
    """A few bytes anywhere: changed, put in, taken out, or all from there on."""
    data = bytearray(b"".join(lines))
    start, length = draw.randrange(len(data)), draw.choice((1, 1, 1, 2, 5, 50))
    new = bytes(draw.choice((draw.randrange(256), draw.choice(data))) for _ in range(length))
    match draw.randrange(4):
        case 0:
            data[start : start + length] = new
        case 1:
            data[start:start] = new
        case 2:
            del data[start : start + length]
        case 3:
            del data[start:]
    return [bytes(data)]


def some_lines(lines: Lines, draw: random.Random) -> Lines:
    """Lines taken out, doubled, exchanged, moved, cut off, or put in from another ledger."""
    lines = list(lines)
    one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    match draw.randrange(6):
        case 0:
            del lines[one]
        case 1:
            lines.insert(other, lines[one])
        case 2:
            lines[one], lines[other] = lines[other], lines[one]
        case 3:
            lines.insert(other, lines.pop(one))
        case 4:
            del lines[one:]
        case 5:
            lines[one] = draw.choice(OTHER)
    return lines


def some_fields(lines: Lines, draw: random.Random) -> Lines:
    """Fields with other values, their own or those of other lines, spelled well; sometimes all hashes made anew."""
    rows = [json.loads(line) for line in lines]
    for _ in range(draw.choice((1, 1, 2, 3))):
        row = draw.choice(rows)
        part = draw.choice([row, *(value for value in row.values() if value and isinstance(value, dict))])
        name = draw.choice(list(part))
        parts = [value for each in rows for value in each.values() if isinstance(value, dict)]
        others = [each[name] for each in parts if name in each]
        part[name] = draw.choice([*VALUES, *others, *([part[name] + 1] if type(part[name]) is int else [])])
    changed = [spelled(row) for row in rows]
    if draw.random() < 0.5:
        try:
            return rehashed(changed)
        except (TypeError, KeyError, ValueError, AttributeError):
            pass  # too broken to have hashes
    return changed


def test_no_random_tampering_goes_unnoticed() -> None:
    draw = random.Random(20260101)
    whole, one = small().lines(), small().lines(client=1)
    assert not found(whole)
    assert not found(one)
    done = 0
    unnoticed = []
    while done < TAMPERINGS:
        lines = draw.choice((whole, one))
        tampered = draw.choice((some_bytes, some_lines, some_fields))(lines, draw)
        if b"".join(tampered) == b"".join(lines):
            continue
        done += 1
        if not found(tampered):
            unnoticed.append(tampered)
    assert unnoticed == []


# --- an older file and a newer one -----------------------------------------------------------------------------------


def test_a_newer_file_continues_an_older_one() -> None:
    written = small()
    older = examined(written.lines())
    written.pay(1, "k4")
    assert contradictions(older, examined(written.lines())) == []
    assert contradictions(older, older) == []
    for client in (1, 2):
        assert contradictions(examined(written.lines(client)), examined(written.lines())) == []
        assert contradictions(older, examined(written.lines(client))) == []


def test_a_ledger_that_was_set_back_or_written_anew_by_the_holder_of_the_key() -> None:
    written, otherwise = small(), small()
    for each in (written, otherwise):
        each.entries.pop()
        each.hashes.pop()
    shorter = examined(written.lines())
    written.pay(1, "k4")
    otherwise.pay(2, "k4")
    older, newer = examined(written.lines()), examined(otherwise.lines())
    assert (older.findings, newer.findings) == ((), ())
    assert "history was rewritten" in contradictions(older, newer)[0]
    assert "set back" in contradictions(older, shorter)[0]
    assert contradictions(shorter, newer) == []
    assert "is of ledger" in contradictions(older, examined(OTHER))[0]
    assert contradictions(older, examined(written.lines()[:-1])) != []
