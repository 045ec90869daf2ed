"""Several processes that make one run together, as `torchrun` starts them: who each is, and what they tell each other.

    torchrun --nproc-per-node 2 -m -- defender_client train PRESET --oracle URL --out RUN

Rank 0 leads: it holds the run's directory and writes what there is one of. What ranks tell each other is tensors, as
safetensors, and JSON; nothing is pickled. It travels by gloo, on the CPU; gradients by `DistributedDataParallel`, over
NCCL where every rank of this machine has a GPU of its own, else over gloo too.

Whoever fails says so, by a key in the store that torchrun keeps and in the next exchange: the others then stop with
`RankStopped`. A rank that is killed says nothing, but its connections close: `RankLost`.

Where `WORLD_SIZE` is 1 or unset there is one rank, nothing of `torch.distributed` is started, and each function below
does its own part and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Protocol, cast

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from defender_client.errors import ConfigError
from defender_client.oracle import WaitGivenUp

Tensors = dict[str, Tensor]

WAIT = timedelta(hours=2)
"""How long ranks wait for one that neither answers nor closes its connections: more than the longest wait for an oracle
that says when to come back."""

_POLL_SECONDS = 0.2
_WORD_SECONDS = 2.0  # between a connection's end and the word of whoever ended it
_STOPPED = "stopped"
_INTERRUPTED = "interrupted"
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|process ?group|socket", re.IGNORECASE)


class RankStopped(Exception):
    """Another rank stopped the run, and its own message says why; the same command resumes."""


class RankLost(RankStopped):
    """A rank is gone without a word: it was killed, or its machine was. The same command resumes."""


class Store(Protocol):
    """What is used of torch's stores."""

    def check(self, keys: list[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...

    def set(self, key: str, value: str) -> None: ...

    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


class Ranks:
    """This process among those that make the run.

    Args:
        rank: of this process, from 0.
        size: of all of them.
        device: of what is trained.
        store: where ranks leave a word for each other; None where there is one rank.
        group: what they tell each other by, on the CPU.
        hosts: whether the store is in this process, and not in torchrun's.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: torch.device = torch.device("cpu"),
        store: Store | None = None,
        group: dist.ProcessGroup | None = None,
        hosts: bool = False,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._store, self._group, self._hosts = store, group, hosts
        self._turns = 0

    @property
    def alone(self) -> bool:
        """Whether this process makes the run by itself."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes what there is one of."""
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """Which of `count` things in a row are this rank's, (start, stop); the ranks' shares differ by one at most."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return start, start + each + (self.rank < more)

    # --- what they tell each other; each of these is called by all ranks, in the same order ---

    def told(self, work: Callable[[], Tensors]) -> list[Tensors]:
        """What `work` returns on each rank, in their order, on the CPU.

        Raises:
            whatever `work` raised here.
            RankStopped: it raised something on another rank.
            KeyboardInterrupt: it was interrupted on another rank.
        """
        if self.alone:
            return [work()]
        failure: BaseException | None = None
        try:
            mine = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in work().items()}
        except BaseException as error:
            failure, mine = error, {_STOPPED: _text_tensor(_word(self.rank, error))}
        parts = [safetensors.torch.load(payload) for payload in self._gathered(safetensors.torch.save(mine))]
        if failure is not None:
            raise failure
        for part in parts:
            if _STOPPED in part:
                self._stop(bytes(part[_STOPPED].tolist()).decode())
        return parts

    def joined(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors [n, ...] in one, in their order; the same on all."""
        if self.alone:
            return tensor
        return torch.cat([part["part"] for part in self.told(lambda: {"part": tensor})])

    def total(self, value: int) -> int:
        """The sum of the ranks' numbers."""
        return value if self.alone else int(self.joined(torch.tensor([value])).sum())

    def any(self, value: bool) -> bool:
        """Whether it is so on any rank."""
        return value if self.alone else bool(self.total(int(value)))

    def from_leader(self, work: Callable[[], str]) -> str:
        """What `work` returns on rank 0, which alone does it."""
        if self.alone:
            return work()
        parts = self.told(lambda: {"text": _text_tensor(work())} if self.leads else {})
        return bytes(parts[0]["text"].tolist()).decode()

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Rank 0 goes through this block before the others do, however long it takes: they find on disk what it made.

        Raises:
            RankStopped: rank 0 did not get through.
        """
        if self._store is None:
            yield
            return
        self._turns += 1
        turn = f"turn/{self._turns}"
        if not self.leads:
            # Polled: a signal is heeded meanwhile, and nothing sets an end to how long rank 0 may take.
            while not self._store.check([turn]):
                self.check()
                time.sleep(_POLL_SECONDS)
        yield
        if self.leads:
            self._store.set(turn, "done")

    def check(self) -> None:
        """Raises RankStopped, or KeyboardInterrupt, if another rank has stopped; costs a round trip to the store. Each
        rank may call it when it likes."""
        if self._store is not None and self._store.check([_STOPPED]):
            self._stop(self._store.get(_STOPPED).decode())

    # --- what is trained ---

    def distributed(self, module: nn.Module) -> nn.Module:
        """The module, whose gradients are from now on the ranks' mean; as it is where there is one rank."""
        if self.alone:
            return module
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What fails in here because a rank is gone is called so."""
        try:
            yield
        except RuntimeError as error:
            if self.alone or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
                raise
            raise self._lost(error) from None

    # --- how it ends ---

    def say(self, error: BaseException) -> None:
        """Leave word for the others of what stopped this rank; the first word stays."""
        if self._store is not None and not isinstance(error, RankStopped):
            self._store.compare_set(_STOPPED, "", _word(self.rank, error))
            if self._hosts:
                time.sleep(_WORD_SECONDS)  # it ends with this process

    def _gathered(self, payload: bytes) -> list[bytes]:
        """Everybody's bytes, in the order of the ranks."""
        with self.watched():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(payload)]), group=self._group)
            most = max(int(size) for size in sizes)
            sent = torch.zeros(most, dtype=torch.uint8)
            sent[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            parts = [torch.empty_like(sent) for _ in range(self.size)]
            dist.all_gather(parts, sent, group=self._group)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def _lost(self, error: RuntimeError) -> BaseException:
        """What a connection's end means: the word of whoever ended it, if there is one."""
        try:
            deadline = time.monotonic() + _WORD_SECONDS
            while time.monotonic() < deadline:
                self.check()
                time.sleep(_POLL_SECONDS)
        except (RankStopped, KeyboardInterrupt) as known:
            return known
        except RuntimeError:
            pass  # the store is gone as well
        first = str(error).splitlines()[0]
        return RankLost(f"a rank is gone without a word: it was killed, or its machine was ({first})")

    def _stop(self, word: str) -> None:
        told = json.loads(word)
        if told["rank"] == self.rank:
            return
        if told["what"] == _INTERRUPTED:
            raise KeyboardInterrupt
        raise RankStopped(f"rank {told['rank']} stopped the run: {told['what']}: {told['text']}")


ALONE = Ranks()
"""One process, as without torchrun."""


@contextmanager
def together() -> Iterator[Ranks]:
    """The ranks that torchrun's environment names, until the block ends; `ALONE` where it names none.

    Raises:
        ConfigError: the environment is not torchrun's.
        RankLost: the others did not come.
    """
    size = _size(os.environ)
    if size == 1:
        yield ALONE
        return
    missing = [variable for variable in _NEEDED if variable not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, and {', '.join(missing)} is not set: start the command by torchrun, or unset it"
        )
    ranks = _join(int(os.environ["RANK"]), size)
    try:
        with ranks.watched():
            yield ranks
            ranks.told(dict)  # nobody leaves while others still need it
    except BaseException as error:
        with suppress(RuntimeError):  # if nobody is there to be told
            ranks.say(error)
        raise
    finally:
        dist.destroy_process_group()


def _size(environment: Mapping[str, str]) -> int:
    text = environment.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE must be a number of processes, not {text!r}: start the command by torchrun")
    return int(text)


def _join(rank: int, size: int) -> Ranks:
    local = int(os.environ["LOCAL_RANK"])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= here
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=WAIT))
        store.set_timeout(WAIT)
        dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=size, timeout=WAIT)
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=WAIT))
    except (RuntimeError, ValueError) as error:
        raise RankLost(f"the other ranks did not come: {str(error).splitlines()[0]}") from None
    words: Store = dist.PrefixStore("zo-defense", store)  # type: ignore[attr-defined]
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return Ranks(rank, size, device, words, group, hosts)


def _word(rank: int, error: BaseException) -> str:
    """A failure as others are told of it."""
    interrupted = isinstance(error, KeyboardInterrupt | WaitGivenUp)
    what = _INTERRUPTED if interrupted else type(error).__name__
    return json.dumps({"rank": rank, "what": what, "text": str(error)})


def _text_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
