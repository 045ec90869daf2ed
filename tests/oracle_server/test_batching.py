"""Rows of several requests in one block: whose, in which order, and what becomes of those beside a failure."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_support import digits

from oracle_server.batching import Batcher, FairOrder
from oracle_server.rows import DenseRows, Float32
from shared.wire.errors import UnacceptableValues

BLOCK = 8


class Engine:
    """Sums each image; keeps every block that it was given, and computes none until it is let."""

    def __init__(self) -> None:
        self.blocks: list[Float32] = []
        self.entered, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.fails_on: float | None = None

    def __call__(self, images: Float32) -> Float32:
        self.blocks.append(images.copy())
        self.entered.release()
        assert self.go.acquire(timeout=30)
        if self.fails_on is not None and (images == self.fails_on).any():
            raise RuntimeError("the engine failed")
        return _sums(images)

    def let(self, blocks: int) -> None:
        for _ in range(blocks):
            self.go.release()

    def marks(self) -> list[float]:
        """The mark of every row, of all blocks."""
        return [float(image.flat[0]) for block in self.blocks for image in block]


class LateRows(DenseRows):
    """Rows of which some turn out to be unacceptable when they are made."""

    def __init__(self, images: Float32, bad_from: int) -> None:
        super().__init__(images)
        self._bad_from = bad_from
        self.made = 0

    def images(self, start: int, stop: int) -> Float32:
        self.made += stop - start
        if stop > self._bad_from:
            raise UnacceptableValues("images[...] is not finite")
        return super().images(start, stop)


def _sums(images: Float32) -> Float32:
    flat = images.reshape(len(images), -1)
    return np.stack([flat.sum(1), flat.max(1)], axis=1)


def marked(rows: int, mark: float) -> DenseRows:
    """Rows that can be told from others'."""
    return DenseRows(np.full((rows, 1, 8, 8), mark, np.float32))


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def batcher(engine: Engine) -> Iterator[Batcher]:
    made = Batcher(engine, BLOCK)
    yield made
    engine.let(1000)
    made.close()


def hold(engine: Engine, batcher: Batcher) -> Future[Float32]:
    """Keep the engine busy with a block, so that what comes next waits together."""
    first = batcher.submit(marked(1, 0.0))
    assert engine.entered.acquire(timeout=10)
    return first


def test_requests_share_blocks_and_each_has_its_own_logits_in_order(engine: Engine, batcher: Batcher) -> None:
    hold(engine, batcher)
    images = [digits(rows, seed=rows) for rows in (3, 1, 20, 2, 8)]
    futures = [batcher.submit(DenseRows(each), client) for client, each in enumerate(images)]
    engine.let(100)
    for future, each in zip(futures, images, strict=True):
        np.testing.assert_array_equal(future.result(10), _sums(each))
    assert [len(block) for block in engine.blocks] == [1, 8, 8, 8, 8, 2]


def test_a_small_request_overtakes_a_large_one_that_was_begun(engine: Engine, batcher: Batcher) -> None:
    large = batcher.submit(marked(5 * BLOCK, 0.5), "a")
    assert engine.entered.acquire(timeout=10)
    small = batcher.submit(marked(1, 0.25), "b")
    engine.let(2)
    assert small.result(10).shape == (1, 2)
    assert not large.done()
    assert engine.marks()[BLOCK : 2 * BLOCK] == [0.25] + [0.5] * (BLOCK - 1)
    engine.let(100)
    assert large.result(10).shape == (5 * BLOCK, 2)


def test_equal_requests_are_served_in_the_order_they_came(engine: Engine, batcher: Batcher) -> None:
    hold(engine, batcher)
    futures = [batcher.submit(marked(6, mark / 10), mark) for mark in range(1, 5)]
    engine.let(100)
    for future in futures:
        future.result(10)
    assert engine.marks()[1:] == pytest.approx([0.1] * 6 + [0.2] * 6 + [0.3] * 6 + [0.4] * 6)


def test_a_client_of_many_requests_has_no_more_than_its_share(engine: Engine, batcher: Batcher) -> None:
    hold(engine, batcher)
    for _ in range(10):
        batcher.submit(marked(BLOCK, 0.5), "many")
    one = batcher.submit(marked(BLOCK, 0.25), "one")
    engine.let(4)
    one.result(10)  # though nine came before it


def test_a_large_request_does_not_starve(engine: Engine, batcher: Batcher) -> None:
    hold(engine, batcher)
    large = batcher.submit(marked(2 * BLOCK, 0.5), "large")
    for number in range(50):  # each block, somebody new comes with a block of his own
        batcher.submit(marked(BLOCK, 0.25), number)
        engine.let(1)
        assert engine.entered.acquire(timeout=10)
        if engine.marks().count(0.5) == 2 * BLOCK:
            break
    # Shared with all who came meanwhile it would have ended later than this.
    assert len(engine.blocks) < 10
    engine.let(100)
    assert large.result(10).shape == (2 * BLOCK, 2)


def test_rows_that_cannot_be_made_fail_their_request_alone(engine: Engine, batcher: Batcher) -> None:
    hold(engine, batcher)
    good = batcher.submit(marked(3, 0.25), "a")
    bad_rows = LateRows(digits(5 * BLOCK), bad_from=2)
    bad, after = batcher.submit(bad_rows, "b"), batcher.submit(marked(3, 0.75), "c")
    engine.let(100)
    assert good.result(10).shape == after.result(10).shape == (3, 2)
    with pytest.raises(UnacceptableValues):
        bad.result(10)
    assert bad_rows.made <= 2 * BLOCK  # the rest of it is not made
    assert all(len(block) <= BLOCK for block in engine.blocks)


def test_rows_on_which_the_engine_fails_fail_their_request_alone(engine: Engine, batcher: Batcher) -> None:
    engine.fails_on = 0.5
    first = hold(engine, batcher)
    beside, bad = batcher.submit(marked(2, 0.25), "a"), batcher.submit(marked(3 * BLOCK, 0.5), "b")
    later = batcher.submit(marked(4 * BLOCK, 0.75), "c")
    engine.let(100)
    with pytest.raises(RuntimeError, match="the engine failed"):
        bad.result(10)
    assert first.result(10).shape == (1, 2)
    np.testing.assert_array_equal(beside.result(10), _sums(np.full((2, 1, 8, 8), 0.25, np.float32)))
    assert later.result(10).shape == (4 * BLOCK, 2)
    assert engine.marks().count(0.5) <= 2 * BLOCK  # the rest of it is not computed
    engine.fails_on = None
    assert batcher.submit(marked(1, 0.5)).result(10).shape == (1, 2)


def test_two_lanes_are_two_blocks_at_a_time_and_parts_of_one_request_meet_again(engine: Engine) -> None:
    batcher = Batcher(engine, BLOCK, lanes=2)
    images = digits(5 * BLOCK + 3)
    future = batcher.submit(DenseRows(images))
    assert engine.entered.acquire(timeout=10)
    assert engine.entered.acquire(timeout=10)  # the second, while the first is held
    assert not engine.entered.acquire(timeout=0.05)
    engine.let(100)
    np.testing.assert_array_equal(future.result(10), _sums(images))
    batcher.close()


def test_a_request_that_fails_in_both_lanes_fails_once(engine: Engine) -> None:
    batcher = Batcher(engine, BLOCK, lanes=2)
    engine.fails_on = 0.5
    bad = batcher.submit(marked(2 * BLOCK, 0.5))
    for _ in range(2):
        assert engine.entered.acquire(timeout=10)
    engine.let(2)
    with pytest.raises(RuntimeError, match="the engine failed"):
        bad.result(10)
    other = batcher.submit(marked(2 * BLOCK, 0.25))
    for _ in range(2):
        assert engine.entered.acquire(timeout=10)  # both lanes are still there
    engine.let(2)
    assert other.result(10).shape == (2 * BLOCK, 2)
    batcher.close()
    assert not batcher._unfinished


def test_two_lanes_answer_each_its_own_and_a_failure_once(engine: Engine) -> None:
    """Many requests of every size; those marked fail in two blocks at a time, and are told so once."""
    batcher, rng = Batcher(engine, BLOCK, lanes=2), np.random.default_rng(0)
    engine.fails_on = 0.5
    engine.let(10_000)
    asked = []
    for number in range(200):
        images = rng.random((int(rng.integers(1, 4 * BLOCK)), 1, 8, 8), dtype=np.float32)
        images[images == 0.5] = 0.25
        fails = number % 10 == 3
        if fails:
            images[:, 0, 0, 0] = 0.5
        asked.append((fails, images, batcher.submit(DenseRows(images), number % 3)))
    for fails, images, future in asked:
        if fails:
            with pytest.raises(RuntimeError, match="the engine failed"):
                future.result(10)
        else:
            np.testing.assert_array_equal(future.result(10), _sums(images))
    batcher.close()
    assert not batcher._unfinished
    assert batcher.rate is not None
    assert batcher.rate > 0


def test_an_engine_that_answers_too_few_rows_is_a_failure() -> None:
    batcher = Batcher(lambda images: _sums(images)[1:], BLOCK)
    with pytest.raises(ValueError, match="2 rows to 3"):
        batcher.submit(marked(3, 0.5)).result(10)
    batcher.close()


def test_a_request_that_was_cancelled_is_not_computed(engine: Engine, batcher: Batcher) -> None:
    hold(engine, batcher)
    gone, stays = batcher.submit(marked(3 * BLOCK, 0.5), "a"), batcher.submit(marked(2, 0.25), "b")
    begun = batcher.submit(marked(3 * BLOCK, 0.75), "c")
    assert gone.cancel()
    engine.let(2)
    assert stays.result(10).shape == (2, 2)
    assert engine.entered.acquire(timeout=10)
    assert begun.cancel()
    engine.let(100)
    assert batcher.submit(marked(1, 0.1)).result(10).shape == (1, 2)
    assert 0.5 not in engine.marks()
    assert 0 < engine.marks().count(0.75) < 3 * BLOCK


@pytest.mark.parametrize("wait", [0.0, 30.0])
def test_an_idle_engine_waits_for_company_as_long_as_it_was_told(wait: float) -> None:
    engine = Engine()
    engine.let(100)
    batcher = Batcher(engine, BLOCK, wait=wait)
    first = batcher.submit(marked(BLOCK - 1, 0.5))
    if not wait:
        first.result(10)
    second = batcher.submit(marked(1, 0.25))  # which fills the block, so that nothing is waited for any more
    assert first.result(10).shape == (BLOCK - 1, 2)
    assert second.result(10).shape == (1, 2)
    assert len(engine.blocks) == (1 if wait else 2)
    batcher.close()


def test_the_wait_ends_without_company() -> None:
    batcher = Batcher(_sums, BLOCK, wait=0.02)
    assert batcher.submit(marked(1, 0.5)).result(10).shape == (1, 2)
    batcher.close()


def test_closing_finishes_what_is_queued(engine: Engine) -> None:
    batcher = Batcher(engine, BLOCK, wait=30.0)
    futures = [batcher.submit(marked(5, mark / 10), mark) for mark in range(4)]
    engine.let(100)
    batcher.close()
    assert all(future.done() and future.result().shape == (5, 2) for future in futures)
    with pytest.raises(RuntimeError):
        batcher.submit(marked(1, 0.5))


def test_what_it_did_is_told(engine: Engine) -> None:
    blocks: list[tuple[int, float]] = []
    waits: list[float] = []
    batcher = Batcher(
        engine, BLOCK, on_block=lambda rows, seconds: blocks.append((rows, seconds)), on_start=waits.append
    )
    assert batcher.rate is None
    engine.let(100)
    batcher.submit(marked(BLOCK + 3, 0.5)).result(10)
    batcher.close()
    assert [rows for rows, _ in blocks] == [BLOCK, 3]
    assert all(seconds > 0 for _, seconds in blocks)
    assert len(waits) == 1
    assert batcher.rate is not None
    assert batcher.rate > 0


def test_many_threads_ask_at_once() -> None:
    batcher = Batcher(_sums, BLOCK)
    wrong: list[int] = []

    def ask(number: int) -> None:
        random = np.random.default_rng(number)
        for _ in range(50):
            images = random.random((int(random.integers(1, 3 * BLOCK)), 1, 8, 8), dtype=np.float32)
            if not np.array_equal(batcher.submit(DenseRows(images), number % 3).result(10), _sums(images)):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    batcher.close()
    assert not wrong


# --- the order, against processor sharing computed in small steps ----------------------------------------------------


def shared_equally(arrivals: list[tuple[int, int, int]], step: float) -> list[float]:
    """When each of (time, rows, weight) would end if all were computed at once; time in rows, by small steps."""
    left = [float(rows) for _, rows, _ in arrivals]
    ends = [0.0] * len(arrivals)
    now = 0.0
    while any(left):
        here = [i for i, (came, _, _) in enumerate(arrivals) if came <= now and left[i] > 0]
        weights = sum(1 / arrivals[i][2] for i in here)
        for i in here:
            left[i] -= step / arrivals[i][2] / weights
            if left[i] <= 1e-9:
                left[i], ends[i] = 0.0, now + step
        now += step
    return ends


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=6))
def test_nobody_ends_later_than_if_the_engine_were_shared_by_all(arrivals: list[tuple[int, int, int]]) -> None:
    arrivals = sorted(arrivals)
    order, left, due, ends = FairOrder(), [rows for _, rows, _ in arrivals], {}, [0] * len(arrivals)
    for now in range(sum(left) + 31):  # one row is computed at a time
        for i, (came, rows, weight) in enumerate(arrivals):
            if came == now:
                due[i] = order.due(rows, 1 / weight)
        here = [i for i in due if left[i]]
        if not here:
            order.reset()
            continue
        first = min(here, key=lambda i: (due[i], i))
        left[first] -= 1
        ends[first] = now + 1
        order.advance(1)
    for end, at_most in zip(ends, shared_equally(arrivals, 1 / 64), strict=True):
        assert end <= at_most + 1 + len(arrivals) * 0.1  # the row that was begun, and the steps' rounding
