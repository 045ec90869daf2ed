"""The kinds of faults: each one drawn with its weight, and done to what is alive."""

from __future__ import annotations

import itertools
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.faults.crew import Crew
from benchmarks.faults.proxy import Cut, Place, Proxy
from benchmarks.faults.racers import RACERS, Order, Racers
from benchmarks.faults.servers import Fleet, Slot
from benchmarks.faults.stores import FaultMissed, Store
from oracle_server.ledger import Ledger
from shared.wire.errors import Unavailable

LEDGER_TIMEOUT_S = 0.5  # the servers' patience with their database
SWEEP_PERIOD_S = 5.0  # of the servers
_TRIES, _HEAD_START_S = 20, 0.02
_RACE_S = 45.0
Kind = tuple[float, Callable[[random.Random], None]]


@dataclass(frozen=True)
class World:
    """What is alive, and can be hurt.

    Attributes:
        operator: the ledger as `oracle-server clients` opens it, beside the servers.
        api_keys: by the clients' names.
        races: the file that the racers' outcomes are written to, a JSON object a line.
    """

    store: Store
    fleet: Fleet
    proxy: Proxy
    racers: Racers
    crew: Crew
    operator: Ledger
    api_keys: dict[str, str]
    races: Path


class Faults:
    """The kinds of faults that this world can be given.

    Attributes:
        kinds: each kind's weight in the draw, and what does it; it raises `FaultMissed` where it hit nothing.
        notes: what the faults hit, counted.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._keys = itertools.count()
        self._racing, self._filling, self._locking = threading.Lock(), threading.Lock(), threading.Lock()
        self._noting = threading.Lock()
        self.notes: Counter[str] = Counter()
        self.kinds = self._all_kinds()

    def _note(self, what: str, count: int) -> None:
        with self._noting:
            self.notes[what] += count

    def _all_kinds(self) -> dict[str, Kind]:
        kinds: dict[str, Kind] = {f"connection cut {place}": (5, self._cutter(place)) for place in Place}
        kinds |= {
            "8 racing retries of one key": (10, self._race_duplicates),
            "8 racing requests, one key, two bodies": (5, self._race_bodies),
            "8 racing requests for the last queries": (8, self._race_last),
            "server killed": (9, self._kill_server),
            "server killed while it starts": (3, self._kill_starting),
            "all servers killed": (2, self._kill_all),
            "server ended in good order": (2, self._end_server),
            "server stopped for a while": (4, self._stop_server),
            "client killed": (14, self._kill_client),
            "database locked, within the timeout": (4, self._lock_shortly),
            "database locked, beyond the timeout": (2, self._lock_long),
            "clock set back": (4, lambda rng: self._set_clock(rng, -1)),
            "clock set forward": (2, lambda rng: self._set_clock(rng, 1)),
        }
        if self._world.store.how_full is not None:
            kinds["disk full"] = (3, self._fill_disk)
        if self._world.store.can_crash:
            kinds["database crashed"] = (3, self._crash_database)
            kinds["database sessions ended"] = (6, self._end_sessions)
            kinds["server stopped until others released what it held"] = (2, self._stop_while_held)
        return kinds

    # --- connections and clients -----------------------------------------------------------------------------------

    def _cutter(self, place: Place) -> Callable[[random.Random], None]:
        def cut(rng: random.Random) -> None:
            if not self._world.proxy.cut(Cut(place, rng.uniform(0.05, 0.95), rng.random() < 0.5), seconds=15):
                raise FaultMissed

        return cut

    def _race(self, kind: str, make: Callable[[int], Order]) -> None:
        """Eight racers; `make` gives the order of each, with the delay of its start for `at`."""
        start = time.monotonic() + _HEAD_START_S
        orders = [make(number) for number in range(RACERS)]
        outcomes = self._world.racers.run([replace(order, at=start + order.at) for order in orders])
        with self._noting, self._world.races.open("a", encoding="utf-8") as races:
            races.write(json.dumps({"kind": kind, "outcomes": [asdict(outcome) for outcome in outcomes]}) + "\n")

    def _race_duplicates(self, rng: random.Random) -> None:
        with self._racing:
            self._race_for_one_key("same", [rng.getrandbits(32)], rng)

    def _race_bodies(self, rng: random.Random) -> None:
        with self._racing:
            self._race_for_one_key("bodies", [rng.getrandbits(32), rng.getrandbits(32)], rng)

    def _race_for_one_key(self, kind: str, bodies: list[int], rng: random.Random) -> None:
        key, rows, spread = f"{kind}-{next(self._keys)}", rng.randint(1, 16), self._spread(rng)
        api_key = self._world.api_keys["racers"]
        self._race(
            kind,
            lambda number: Order(api_key, key, bodies[number % len(bodies)], rows, rng.uniform(0, spread), _RACE_S),
        )

    @staticmethod
    def _spread(rng: random.Random) -> float:
        """All at the same moment; or so that some come while others are answered; or after."""
        return rng.choice((0.0, 0.0, 0.02, 0.3))

    def _race_last(self, rng: random.Random) -> None:
        """Fewer queries than eight racers ask for; and whoever else is at the end of a budget gets a few more, too."""
        with self._racing:
            for name in ("edge-0", "edge-1"):
                self._raise_budget(name, rng.randint(5, 40))
            self._raise_budget("last", rng.randint(1, RACERS - 1))
            api_key, seed, race = self._world.api_keys["last"], rng.getrandbits(32), next(self._keys)
            self._race("last", lambda number: Order(api_key, f"last-{race}-{number}", seed + number, 1, 0.0, _RACE_S))

    def _raise_budget(self, name: str, by: int) -> None:
        """The operator's doing: the client has at least `by` queries left."""
        deadline = time.monotonic() + 30
        while True:
            try:
                client = self._world.operator.get_client(name)
                self._world.operator.set_budget(name, max(client.budget, client.spent + client.held + by))
                return
            except Unavailable:
                if time.monotonic() > deadline:
                    raise FaultMissed from None
                time.sleep(0.1)

    def _kill_client(self, rng: random.Random) -> None:
        if not self._world.crew.kill(rng):
            raise FaultMissed

    # --- servers ---------------------------------------------------------------------------------------------------

    def _kill_server(self, rng: random.Random) -> None:
        """Sometimes for so long that the other server's sweep has to settle what it left."""
        self._kill_one(rng.choice(self._world.fleet.slots), rng)

    def _kill_one(self, slot: Slot, rng: random.Random) -> None:
        slot.by_command = rng.random() < 0.1
        down_for = rng.uniform(5, 7) if rng.random() < 0.08 else rng.uniform(0, 0.3)
        waiting = self._world.proxy.waiting
        if not self._world.fleet.kill(slot, down_for):
            raise FaultMissed
        self._note("killed with queries in flight", waiting > 0)

    def _kill_all(self, rng: random.Random) -> None:
        waiting, killed = self._world.proxy.waiting, False
        for slot in self._world.fleet.slots:
            killed |= self._world.fleet.kill(slot, rng.uniform(0, 0.3))
        if not killed:
            raise FaultMissed
        self._note("killed with queries in flight", waiting > 0)

    def _kill_starting(self, rng: random.Random) -> None:
        slot = rng.choice(self._world.fleet.slots)
        generation = slot.generation
        self._world.fleet.kill(slot, 0.0)
        deadline = time.monotonic() + 10
        while slot.generation == generation:
            if time.monotonic() > deadline:
                raise FaultMissed
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.4))
        if not self._world.fleet.kill(slot, rng.uniform(0, 0.1)):
            raise FaultMissed

    def _end_server(self, rng: random.Random) -> None:
        if not self._world.fleet.kill(rng.choice(self._world.fleet.slots), rng.uniform(0, 0.3), signal.SIGTERM):
            raise FaultMissed

    def _stop_server(self, rng: random.Random) -> None:
        slot = rng.choice(self._world.fleet.slots)
        generation = slot.generation
        if not slot.signal(signal.SIGSTOP):
            raise FaultMissed
        time.sleep(rng.choice((rng.uniform(0.05, 0.5), rng.uniform(0.5, 3))))
        with slot.lock:
            if slot.generation == generation:
                slot.signal(signal.SIGCONT)

    def _set_clock(self, rng: random.Random, sign: int) -> None:
        """Of a server that runs, at once; the next fault of this kind sets it again, from the true time."""
        seconds = rng.choice((0.5, 60, 3600, 86_400, 366 * 86_400))
        rng.choice(self._world.fleet.slots).clock_shift.value = sign * seconds * rng.uniform(0.5, 1)

    # --- the database ----------------------------------------------------------------------------------------------

    def _lock_shortly(self, rng: random.Random) -> None:
        with self._locking:
            self._world.store.lock(rng.uniform(0.1, 0.8) * LEDGER_TIMEOUT_S, rng)

    def _lock_long(self, rng: random.Random) -> None:
        with self._locking:
            self._world.store.lock(rng.uniform(1.2, 4) * LEDGER_TIMEOUT_S, rng)

    def _fill_disk(self, rng: random.Random) -> None:
        with self._filling:
            self._world.store.fill(rng.uniform(0.2, 1.5), self._world.fleet.pids())

    def _crash_database(self, rng: random.Random) -> None:
        with self._locking:
            self._world.store.crash(rng.uniform(0, 0.5))

    def _end_sessions(self, rng: random.Random) -> None:
        ended = self._world.store.end_sessions(0.5, rng)
        self._note("database sessions ended", ended)

    def _stop_while_held(self, rng: random.Random) -> None:
        """Stop a server between reserving and paying, and take its lock: it wakes up to reservations it has no more."""
        slot = rng.choice(self._world.fleet.slots)
        for _ in range(_TRIES):
            with self._racing:
                many = threading.Thread(target=self._race_for_many_keys, args=(random.Random(rng.getrandbits(64)),))
                many.start()
                try:
                    time.sleep(_HEAD_START_S + rng.uniform(0, 0.1))
                    released = self._stop_and_take(slot, rng)
                finally:
                    many.join()  # the racers are for one race at a time
            if released:
                self._note("reservations released while their server was stopped", released)
                return
        raise FaultMissed

    def _stop_and_take(self, slot: Slot, rng: random.Random) -> int:
        """How many of its reservations others released while it was stopped."""
        generation = slot.generation
        if not slot.signal(signal.SIGSTOP):
            return 0
        try:
            held = self._held()
            if held:
                self._world.store.end_sessions(1.0, rng)
                time.sleep(rng.uniform(1.1, 1.4) * SWEEP_PERIOD_S)
            return len(held - self._world.store.open_reservations())
        finally:
            with slot.lock:
                if slot.generation == generation:
                    slot.signal(signal.SIGCONT)

    def _race_for_many_keys(self, rng: random.Random) -> None:
        api_key, images, race = self._world.api_keys["racers"], rng.getrandbits(32), next(self._keys)
        self._race("many", lambda number: Order(api_key, f"many-{race}-{number}", images + number, 4, 0.0, _RACE_S))

    def _held(self) -> set[int]:
        """Reservations that stay open: those of a server that works are paid a moment later."""
        store = self._world.store
        first = store.open_reservations()
        if first:
            time.sleep(0.1)
        return first & store.open_reservations()
