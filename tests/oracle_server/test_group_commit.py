from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from oracle_server.group_commit import GroupCommit


class Poison(Exception):
    pass


class Disk:
    """Groups as they are written; the first write of a test waits for `go`."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.entered, self.go = threading.Event(), threading.Event()

    def apply(self, operations: Sequence[int]) -> list[object]:
        self.groups.append(list(operations))
        self.entered.set()
        assert self.go.wait(10)
        if any(each < 0 for each in operations):
            raise Poison
        if any(each == 13 for each in operations):
            raise OSError("no space left")
        return [ValueError(each) if each % 2 else 10 * each for each in operations]


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def commits(disk: Disk) -> Iterator[GroupCommit[int]]:
    made = GroupCommit[int](disk.apply, alone=(Poison,))
    yield made
    disk.go.set()
    made.close()


def test_what_waits_for_the_disk_shares_the_next_write(commits: GroupCommit[int], disk: Disk) -> None:
    first = commits.submit(0)
    assert disk.entered.wait(10)
    rest = [commits.submit(2 * n) for n in range(1, 6)]
    disk.go.set()
    assert [future.result(10) for future in (first, *rest)] == [0, 20, 40, 60, 80, 100]
    assert disk.groups == [[0], [2, 4, 6, 8, 10]]


def test_a_refusal_is_its_callers_alone(commits: GroupCommit[int], disk: Disk) -> None:
    commits.submit(0)
    assert disk.entered.wait(10)
    futures = [commits.submit(n) for n in (2, 3, 4)]
    disk.go.set()
    assert [futures[0].result(10), futures[2].result(10)] == [20, 40]
    with pytest.raises(ValueError, match="3"):
        futures[1].result(10)


def test_one_bad_operation_does_not_take_its_group_with_it(commits: GroupCommit[int], disk: Disk) -> None:
    commits.submit(0)
    assert disk.entered.wait(10)
    futures = [commits.submit(n) for n in (2, -1, 4)]
    disk.go.set()
    assert [futures[0].result(10), futures[2].result(10)] == [20, 40]
    with pytest.raises(Poison):
        futures[1].result(10)
    assert disk.groups == [[0], [2, -1, 4], [2], [-1], [4]]


def test_a_disk_that_fails_fails_everybody_and_is_not_tried_once_more(commits: GroupCommit[int], disk: Disk) -> None:
    commits.submit(0)
    assert disk.entered.wait(10)
    futures = [commits.submit(n) for n in (2, 13, 4)]
    disk.go.set()
    for future in futures:
        with pytest.raises(OSError, match="no space"):
            future.result(10)
    assert disk.groups == [[0], [2, 13, 4]]
    assert commits.submit(6).result(10) == 60


def test_closing_finishes_what_is_queued(commits: GroupCommit[int], disk: Disk) -> None:
    futures = [commits.submit(n) for n in (0, 2, 4)]
    threading.Timer(0.05, disk.go.set).start()
    commits.close()
    assert [future.result(0) for future in futures] == [0, 20, 40]
    with pytest.raises(RuntimeError, match="closed"):
        commits.submit(6)
    commits.close()  # again is no error
