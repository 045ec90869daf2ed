"""What the ledger costs a query: the same server with its ledger, and with one that remembers nothing.

    python benchmarks/ledger_cost.py [--rounds 60] [--rows 256]

Two servers in this process share one ResNet-20 (random weights) behind one engine. One client asks them in turn, one
request at a time; then two clients keep two requests in flight at each. Printed is the ratio of times, pair by pair.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / "oracle_server")]

from shared.process import prepare  # noqa: E402

prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from oracle_support import Caller, Running, running  # noqa: E402

from oracle_server.book import Charge, Payment, Reservation, Reserve  # noqa: E402
from oracle_server.engines import build_block_engine  # noqa: E402
from oracle_server.ledger import Client  # noqa: E402
from oracle_server.oracle import Oracle  # noqa: E402
from oracle_server.settings import Settings  # noqa: E402
from shared.audit.chain import Entry  # noqa: E402
from shared.models.classifiers import build_own  # noqa: E402


class NoLedger:
    """Says yes to everything and writes nothing: the server without its ledger."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def find_client(self, key_id: str) -> Client:
        return self._client

    def submit(self, operation: object) -> Future[Any]:
        done: Future[Any] = Future()
        match operation:
            case Reserve(client_id, rows, key, sha):
                done.set_result(Reservation(1, client_id, rows, key, sha))
            case Charge(reservation):
                entry = Entry(2, "", reservation.client_id, "charge", reservation.rows)
                done.set_result(Payment(entry, bytes(32), reservation.rows, 0))
            case _:
                done.set_result(None)
        return done

    def receipt(self, payment: Payment) -> str:
        return ""

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="Where the ledger lies; by default the system's temporary folder.")
    options = parser.parse_args()
    torch.set_num_threads(torch.get_num_threads())
    module = build_own("cifar-resnet20", channels=3, classes=10)
    assert module is not None
    module.eval()
    oracle = Oracle(build_block_engine(module, (3, 32, 32)), (3, 32, 32), 10)
    images = np.random.default_rng(0).random((options.rows, 3, 32, 32), dtype=np.float32)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        settings = [Settings(ledger=f"{folder}/{name}.db") for name in ("with", "without")]
        with running(settings[0], oracle) as kept, running(settings[1], oracle) as free:
            callers = [kept.caller(10**12), free.caller(10**12)]
            _forget(free, callers[1])
            for in_flight in (1, 2):
                _report(in_flight, options.rows, _measure(callers, images, options.rounds, in_flight))


def _forget(server: Running, caller: Caller) -> None:
    state = server.app.state
    state.service = dataclasses.replace(state.service, ledger=NoLedger(caller.client))


def _measure(callers: list[Caller], images: np.ndarray, rounds: int, in_flight: int) -> list[list[float]]:
    """Seconds for `in_flight` requests at once, a round a row: with the ledger, without it."""
    times = []
    with ThreadPoolExecutor(in_flight) as pool:
        for round_ in range(-3, rounds):
            row = [0.0, 0.0]
            for which in (0, 1) if round_ % 2 else (1, 0):
                start = time.perf_counter()
                keys = [f"{in_flight}/{round_}/{which}/{n}" for n in range(in_flight)]
                list(pool.map(lambda key, caller=callers[which]: _ask(caller, images, key), keys))
                row[which] = time.perf_counter() - start
            if round_ >= 0:
                times.append(row)
    return times


def _ask(caller: Caller, images: np.ndarray, key: str) -> None:
    assert caller.infer(images, Idempotency_Key=key).status_code == 200


def _report(in_flight: int, rows: int, times: list[list[float]]) -> None:
    ratios = sorted(kept / free for kept, free in times)
    quarter = len(ratios) // 4
    kept, free = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"{in_flight} in flight: {in_flight * rows / free:7.0f} images/s without, {in_flight * rows / kept:7.0f} with; "
        f"time with / without: median {statistics.median(ratios):.4f}, "
        f"quartiles {ratios[quarter]:.4f} to {ratios[-quarter - 1]:.4f}, {len(ratios)} pairs"
    )


if __name__ == "__main__":
    main()
