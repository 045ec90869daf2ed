"""Durable charges a second: with group commit, and one at a time.

    python benchmarks/ledger_throughput.py [--ledger URL] [--charges 4000] [--callers 1 16 64 256] [--rounds 5]

A charge is both of its steps, reservation and payment, each on the disk (SQLite: WAL, synchronous=FULL) before its
caller goes on. The two ways take turns; the ratio is round by round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from oracle_server import group_commit
from oracle_server.ledger import Ledger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", help="An empty database; by default a SQLite file, removed at the end.")
    parser.add_argument("--charges", type=int, default=4000, help="A round.")
    parser.add_argument("--callers", type=int, nargs="*", default=[1, 16, 64, 256], help="Waiting at once.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="Where the ledger lies; by default the system's temporary folder.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ledger = Ledger.open(options.ledger or f"{folder}/ledger.db", signing_key=Path(folder) / "signing.key")
        client, _ = ledger.add_client("benchmark", 10**15)
        print("callers   charges/s in groups (min, median, max)   one at a time: median   ratio (min, median, max)")
        for callers in options.callers:
            grouped, single = [], []
            for round_ in range(options.rounds):
                name = f"{callers}/{round_}"
                grouped.append(_rate(ledger, client.id, options.charges, callers, f"{name}/grouped"))
                with mock.patch.object(group_commit, "_MOST", 1):
                    single.append(_rate(ledger, client.id, options.charges // 8, callers, f"{name}/single"))
            ratios = [a / b for a, b in zip(grouped, single, strict=True)]
            print(
                f"{callers:7d}   {min(grouped):12.0f} {statistics.median(grouped):8.0f} {max(grouped):8.0f}"
                f"          {statistics.median(single):20.0f}        "
                f"{min(ratios):8.2f} {statistics.median(ratios):6.2f} {max(ratios):6.2f}",
                flush=True,
            )
        verification = ledger.verify()
        print(f"verify: {verification.entries:,} entries, {len(verification.findings)} findings")
        ledger.close()
        sys.exit(not verification.intact)


def _rate(ledger: Ledger, client_id: int, charges: int, callers: int, name: str) -> float:
    """Charges a second of `callers` threads that each wait for their own."""
    each = max(1, charges // callers)

    def spend(caller: int) -> None:
        for number in range(each):
            ledger.charge(ledger.reserve(client_id, 256, f"{name}/{caller}/{number}", "0" * 64))

    with ThreadPoolExecutor(callers) as pool:
        start = time.perf_counter()
        list(pool.map(spend, range(callers)))
        return each * callers / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
