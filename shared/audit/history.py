"""Two exports of one ledger, an older and a newer: whether the newer only added to the older.

hash_i stands for all entries up to i. So a newer ledger whose hash at the older one's end is the older one's head holds
the same entries up to there, in the same order. This is what a signature alone cannot show: whoever keeps a copy of a
database can put back an older state with the head that was signed for it.
"""

from __future__ import annotations

from shared.audit.export import Examined


def contradictions(older: Examined, newer: Examined) -> list[str]:
    """Why `newer` is no continuation of `older`, one sentence each; empty where it is one.

    Both must have been found whole: hashes of a file with findings say nothing. Entries left out of either do not
    matter.
    """
    if older.head is None or newer.head is None:
        return ["without its signed end a file cannot be compared with another"]
    if older.ledger != newer.ledger:
        return [f"the older file is of ledger {older.ledger}, and this one is of {newer.ledger}"]
    seq = older.head.seq
    if seq > newer.head.seq:
        return [
            f"the older file ends at entry {seq} and this one at {newer.head.seq}: it is the older of the two, or the "
            "ledger was set back"
        ]
    if newer.hashes[seq] != older.head.hash:
        return [f"the two ledgers are not the same up to entry {seq}, where the older file ends: history was rewritten"]
    return []
