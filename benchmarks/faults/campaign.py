"""A campaign from its start to the clients' end: who takes part, and how faults are drawn."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.faults.crew import Crew
from benchmarks.faults.kinds import LEDGER_TIMEOUT_S, Faults, World
from benchmarks.faults.proxy import Proxy
from benchmarks.faults.racers import Racers
from benchmarks.faults.servers import Fleet, forkserver
from benchmarks.faults.stores import FaultMissed, Store
from benchmarks.faults.work import Job
from oracle_server.ledger import Ledger

_AT_ONCE = 8  # faults that last while others come
_SAY_EVERY_S = 5.0
_FINISH_S = 120.0
_ROOMY = 1_000_000_000
# Defenders: the client of each, and whether it asks for as long as it takes. Two processes share each small budget.
_DEFENDERS = (
    ("roomy-0", True),
    ("roomy-0", True),
    ("roomy-1", True),
    ("roomy-2", False),
    ("roomy-3", False),
    ("edge-0", True),
    ("edge-0", False),
    ("edge-1", True),
    ("edge-1", True),
)
# Clients that never run out, and clients that are always near it: the operator gives those a few more now and then.
_SMALL = {"edge-0": 50, "edge-1": 50, "last": 0}
_BUDGETS = {name: _SMALL.get(name, _ROOMY) for name in dict.fromkeys((*(n for n, _ in _DEFENDERS), "racers", "last"))}


@dataclass(frozen=True)
class Plan:
    """What a campaign is to do: the same plan draws the same faults; what they hit is a matter of moments."""

    faults: int
    seed: int
    folder: Path
    pause: float  # seconds between two faults, on average
    servers: int = 2


@dataclass(frozen=True)
class Done:
    """What a campaign did, and where the evidence is.

    Attributes:
        faults: how many of each kind.
        missed: draws that found nothing to happen to, and were drawn again.
        seconds: how long the faults took.
        notes: counts of what was started, asked and hit.
        failures: what the campaign itself did not manage, a sentence each.
        public_key: the ledger's, as it was before the first fault.
        server_options: to open the ledger again.
        api_keys: by the clients' names.
        runs: the defenders' run directories, by the clients' names.
        witness, races, server_log: files.
    """

    faults: Counter[str]
    missed: int
    seconds: float
    notes: dict[str, int]
    failures: list[str]
    public_key: bytes
    server_options: list[str]
    api_keys: dict[str, str]
    runs: dict[str, list[Path]]
    witness: Path
    races: Path
    server_log: Path


def run(plan: Plan, store: Store, say: Callable[[str], None]) -> Done:
    """Inject the faults, let the clients finish without any, and stop the servers.

    Args:
        store: a database without a ledger.
        say: takes a line of progress.
    """
    folder = plan.folder
    witness, races, server_log, finish = (folder / n for n in ("witness.jsonl", "races.jsonl", "servers.log", "finish"))
    races.touch()
    key_file = folder / "signing.key"
    ledger_options = ["--ledger", store.url, "--signing-key", str(key_file)]
    options = [*ledger_options, "--ledger-timeout", str(LEDGER_TIMEOUT_S), "--drain-timeout", "5"]
    context = forkserver()
    with contextlib.ExitStack() as alive:
        operator = Ledger.open(store.url, signing_key=key_file, timeout=5.0)
        alive.callback(operator.close)
        api_keys = {name: operator.add_client(name, budget)[1].reveal() for name, budget in _BUDGETS.items()}
        fleet = Fleet(context, options, server_log, plan.servers)
        alive.callback(fleet.stop)
        accounts = {key: name for name, key in api_keys.items()}
        proxy = Proxy(fleet.ports, accounts, witness, store.stands, random.Random(plan.seed + 1))
        alive.callback(proxy.close)
        racers = Racers(context, proxy.url, plan.seed)
        alive.callback(racers.close)
        _wait_for(proxy.url)
        crew = Crew(context, _jobs(plan, proxy.url, api_keys, finish), finish)
        alive.callback(crew.close)
        faults = Faults(World(store, fleet, proxy, racers, crew, operator, api_keys, races))
        drawing = _Drawing(plan, faults, lambda: f"{proxy.requests} requests, {proxy.answers} answers", say)
        seconds = drawing.run()
        say("the faults are over; the clients finish")
        for slot in fleet.slots:
            slot.clock_shift.value = 0.0
        failures = [*drawing.failures, *crew.finish(_FINISH_S)]
    return Done(
        faults=drawing.counts,
        missed=drawing.missed,
        seconds=seconds,
        notes={
            "requests": proxy.requests,
            "answers": proxy.answers,
            "server starts": fleet.starts,
            "of them by the real command": fleet.starts_by_command,
            "client starts": crew.starts,
            **faults.notes,
        },
        failures=failures,
        public_key=bytes.fromhex(operator.identity.public_key),
        server_options=ledger_options,
        api_keys=api_keys,
        runs=crew.runs,
        witness=witness,
        races=races,
        server_log=server_log,
    )


class _Drawing:
    """Draws faults from the seed, and does several at once where they last."""

    def __init__(self, plan: Plan, faults: Faults, state: Callable[[], str], say: Callable[[str], None]) -> None:
        self._plan, self._faults, self._state, self._say = plan, faults, state, say
        self._lock, self._room = threading.Lock(), threading.Semaphore(_AT_ONCE)
        self._under_way = 0
        self.counts: Counter[str] = Counter()
        self.missed = 0
        self.failures: list[str] = []

    def run(self) -> float:
        """Returns the seconds it took."""
        rng = random.Random(self._plan.seed)
        names, weights = list(self._faults.kinds), [weight for weight, _ in self._faults.kinds.values()]
        start = said = time.monotonic()
        with ThreadPoolExecutor(_AT_ONCE, "fault") as pool:
            while self.counts.total() < self._plan.faults and not self.failures:
                self._room.acquire()
                with self._lock:
                    enough = self.counts.total() + self._under_way >= self._plan.faults
                    self._under_way += not enough
                if enough:  # unless one of those under way misses
                    self._room.release()
                    time.sleep(0.01)
                    continue
                (name,) = rng.choices(names, weights)
                pool.submit(self._inject, name, random.Random(rng.getrandbits(64)))
                time.sleep(rng.expovariate(1 / self._plan.pause))
                if time.monotonic() - said > _SAY_EVERY_S:
                    said = time.monotonic()
                    self._say(self._progress(said - start))
        return time.monotonic() - start

    def _inject(self, name: str, rng: random.Random) -> None:
        try:
            self._faults.kinds[name][1](rng)
        except FaultMissed:
            with self._lock:
                self.missed += 1
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self.failures.append(f"'{name}' could not be done: {error!r}")
        else:
            with self._lock:
                self.counts[name] += 1
        finally:
            with self._lock:
                self._under_way -= 1
            self._room.release()

    def _progress(self, seconds: float) -> str:
        done = self.counts.total()
        left = (self._plan.faults - done) * seconds / max(1, done)
        return (
            f"{done} of {self._plan.faults} faults, {done / seconds:.1f} a second; {self._state()}; {left:.0f} s left"
        )


def _jobs(plan: Plan, url: str, api_keys: dict[str, str], finish: Path) -> list[tuple[str, Job]]:
    return [
        (
            client,
            Job(
                url=url,
                api_key=api_keys[client],
                run=plan.folder / f"defender-{number}",
                seed=plan.seed * 100 + number,
                most_rows=16 if client.startswith("roomy") else 3,
                retry_seconds=20.0 if patient else 2.0,
                persistent=patient,
                pause=0.02,
                finish=finish,
            ),
        )
        for number, (client, patient) in enumerate(_DEFENDERS)
    ]


def _wait_for(url: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/v2/health/ready", timeout=10).status_code == 200:
                return
        if time.monotonic() > deadline:
            raise TimeoutError("no server answers")
        time.sleep(0.05)
