"""How the page's numbers and the watch scale with the ledger: `python benchmarks/dashboard_scale.py LEDGER [ENTRIES]`.

Where LEDGER is no file yet, it is made first, with ENTRIES entries of 8 clients over the last two weeks.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import update

from oracle_server import chain, dashboard, tables
from oracle_server import ledger as ledger_module
from oracle_server.clock import timestamp
from oracle_server.ledger import Ledger
from oracle_server.watch import Watch

REPEATS, SPAN, ROWS, GROUP = 5, timedelta(days=14), 256, 5_000


def fill(ledger: Ledger, entries: int) -> None:
    """Requests of 256 queries, two entries each, at even times."""
    now = datetime.now(UTC)
    written = 0

    def at_even_times() -> str:
        nonlocal written
        written += 1
        return timestamp(now - SPAN + SPAN * (written / entries))

    ledger_module.utc_now = chain.utc_now = at_even_times
    clients = [ledger.add_client(f"client-{n}", 10**12)[0] for n in range(8)]
    while written < entries:
        spent = dict.fromkeys((client.id for client in clients), 0)
        with ledger._appending() as (connection, end):
            for n in range(min(GROUP, (entries - written) // 2 + 1)):
                client, request = clients[n % 8], {"idempotency_key": f"key-{written}", "body_sha256": "ab" * 32}
                entry, _ = end.append("reserve", client.id, rows=ROWS, note="benchmark", **request)
                end.append("charge", client.id, rows=ROWS, refers_to=entry.seq, **request)
                spent[client.id] += ROWS
            for client_id, rows in spent.items():
                clients_table = tables.clients
                chosen = update(clients_table).where(clients_table.c.id == client_id)
                connection.execute(chosen.values(spent=clients_table.c.spent + rows))


def milliseconds(ledger: Ledger, what: str, client_id: int | None) -> tuple[float, float]:
    """Wall clock and processor time of reading one part of the page, medians."""
    walls, works = [], []
    for _ in range(REPEATS):
        wall, work, now = time.perf_counter(), time.process_time(), datetime.now(UTC)
        with ledger.reading() as connection:
            if what == "accounts":
                dashboard.accounts(connection, now, client_id)
            elif what == "entries":
                dashboard.latest(connection, client_id)
            else:
                dashboard.spending(connection, what, now, client_id)
        walls.append(1000 * (time.perf_counter() - wall))
        works.append(1000 * (time.process_time() - work))
    return statistics.median(walls), statistics.median(works)


def main(path: Path, entries: int) -> None:
    ledger = Ledger.open(str(path))
    if not ledger.list_clients():
        fill(ledger, entries)
    print(f"{ledger.head().head.seq:,} entries, {path.stat().st_size / 2**20:.0f} MiB")
    print(f"{'':10}{'admin: wall':>14}{'processor':>12}{'client: wall':>16}{'processor':>12}   (ms)")
    for what in ("accounts", "entries", *dashboard.WINDOWS):
        (wall, work), (own_wall, own_work) = milliseconds(ledger, what, None), milliseconds(ledger, what, 3)
        print(f"{what:10}{wall:14.1f}{work:12.1f}{own_wall:16.1f}{own_work:12.1f}")
    watch, before = Watch(ledger), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, work, longest = time.perf_counter(), time.process_time(), 0.0
    while watch.verdict.checked_at is None:
        begun = time.process_time()
        watch.step()
        longest = max(longest, time.process_time() - begun)
    wall, work = time.perf_counter() - wall, time.process_time() - work
    after, seq = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, watch.verdict.verified
    print(
        f"watch: {watch.verdict.state}, {1e6 * work / seq:.1f} us of processor an entry, {wall:.0f} s without pauses, "
        f"longest piece {1000 * longest:.0f} ms, {(after - before) / 1024:.0f} MiB more"
    )
    ledger.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000)
