"""Charges a second through Ray Serve's proxy, beside uvicorn's without one: the same ledger in PostgreSQL for all.

    python benchmarks/ray_replicas.py [--rows 1 256] [--threads 8] [--requests 100] [--rounds 10] [--ledger URL]

Three servers of one classifier take turns: `oracle-server serve`; two of it, asked in turn; `oracle-server ray` with
two replicas behind its one address. A turn is so many requests of one defender with so many threads. Ratios are taken
within a round. All are on one machine, the defender, PostgreSQL and Ray's own processes too, so this measures what a
request costs in all; more machines are not measured here.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measuring import Child, Disturbance, ended_by_signal, heading, interleave, ratios, spread, table
from defender_client.oracle_client import RemoteOracle
from oracle_server.ledger import Ledger

_START_S = 240.0
_ONE, _TWO, _RAY = "uvicorn, 1 process", "uvicorn, 2 processes", "Ray, 2 replicas"
_TESTS = Path(__file__).parents[1] / "tests" / "oracle_server"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256], help="Images of a request.")
    parser.add_argument("--threads", type=int, default=8, help="Of the defender, each with a request under way.")
    parser.add_argument("--requests", type=int, default=100, help="Of a turn.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--ledger", help="An empty PostgreSQL database; by default one of our own, without fsync.")
    parser.add_argument("--serve-options", default="--engine eager", help="Of all servers, as one string.")
    options = parser.parse_args()
    print(heading("ray", "uvicorn", "fastapi", "psycopg", "torch"), flush=True)
    with ended_by_signal() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = options.ledger or _own_database()
        ledger = Ledger.open(url, signing_key=folder / "signing.key")
        stack.callback(ledger.close)
        _, key = ledger.add_client("benchmark", 10**12)
        given = ["--ledger", url, "--signing-key", str(folder / "signing.key"), "--port", "0"]
        given += ["--engine-cache", str(folder / "engines"), *shlex.split(options.serve_options)]
        ways = (["serve"], ["serve"], ["ray", "--replicas", "2", "--num-cpus", "0.5"])
        urls = []
        for way in ways:  # one after another: the first one measures the engine for all
            child = stack.enter_context(Child([sys.executable, "-m", "oracle_server", *way, *given]))
            urls.append(_address(child))
        asked = {_ONE: urls[:1], _TWO: urls[:2], _RAY: urls[2:]}
        oracles = {each: stack.enter_context(RemoteOracle(each, key.reveal())) for each in urls}
        pool = stack.enter_context(ThreadPoolExecutor(options.threads))
        for rows in options.rows:
            candidates: dict[str, Callable[[], float]] = {
                name: partial(_turn, pool, [oracles[each] for each in those], rows, options.requests)
                for name, those in asked.items()
            }
            disturbance = Disturbance()
            rates = interleave(options.rounds, candidates)
            print(f"\n{rows} rows a request, {options.threads} threads; {disturbance}\n")
            _report(rates, rows)
        verified = ledger.verify()
        print(f"\nverify: {verified.entries:,} entries, {len(verified.findings)} findings")
        sys.exit(not verified.intact)


def _address(child: Child) -> str:
    """What a server says once it answers; Ray may have something to say before."""
    said = ""
    while not said.startswith("listening on "):
        said = child.line(_START_S)
    return said.removeprefix("listening on ").strip()


def _own_database() -> str:
    """Of the tests' own PostgreSQL, which ends with this process."""
    sys.path.insert(0, str(_TESTS))
    import databases

    cluster = databases.postgres()
    if cluster is None:
        sys.exit("PostgreSQL's initdb is not on this machine: give --ledger")
    return str(cluster.new_database())


def _turn(pool: ThreadPoolExecutor, oracles: Sequence[RemoteOracle], rows: int, requests: int) -> float:
    """Requests answered, and charged, a second."""
    images = np.random.default_rng(0).random((rows, 1, 8, 8), dtype=np.float32)
    turns = itertools.cycle(oracles)
    started = time.perf_counter()
    label = f"turn-{time.monotonic_ns()}"
    asked = [
        pool.submit(oracle.query, images, purpose="benchmark", label=f"{label}/{number}")
        for number, oracle in zip(range(requests), turns, strict=False)
    ]
    for each in asked:
        each.result()
    return requests / (time.perf_counter() - started)


def _report(rates: dict[str, list[float]], rows: int) -> None:
    lines = [
        [name, spread(made).show(",.0f"), f"{spread(made).median * rows:,.0f}"]
        + [ratios(made, rates[other]).show(".2f") for other in (_ONE, _TWO)]
        for name, made in rates.items()
    ]
    print(table(["", "requests/s", "rows/s", "of 1 process", "of 2 processes"], lines))


if __name__ == "__main__":
    main()
