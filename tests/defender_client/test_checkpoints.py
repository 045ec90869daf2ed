"""Checkpoints: a run that is read back goes on to the bit as the one that was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from defender_support import DNCNN, tiny
from safetensors import safe_open

from defender_client import checkpoints
from defender_client.checkpoints import CheckpointError, Progress
from defender_client.pretrain import fresh_stack
from defender_client.stack import Stack, specify

Make = Callable[[Stack], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adam": lambda stack: torch.optim.Adam(stack.trainable(), 1e-2, weight_decay=1e-3),
    "sgd": lambda stack: torch.optim.SGD(stack.trainable(), 1e-2, momentum=0.9),
}
PROGRESS = Progress(step=3, epoch=1, batch=2, queries=1234, best=0.5)


def fresh(folder: Path, *settings: str) -> Stack:
    return fresh_stack(specify(tiny(folder, *settings), (1, 8, 8), 10), 0).train()


def step(stack: Stack, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    optimizer.zero_grad()
    stack.front(torch.rand(4, 1, 8, 8, generator=generator)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("settings", [(), DNCNN], ids=["unet", "dncnn"])
def test_it_goes_on_to_the_bit(tmp_path: Path, kind: str, settings: tuple[str, ...]) -> None:
    stack, generator = fresh(tmp_path, *settings), torch.Generator().manual_seed(3)
    optimizer = OPTIMIZERS[kind](stack)
    for _ in range(3):
        step(stack, optimizer, generator)
    path = tmp_path / "deep" / "checkpoint.safetensors"
    checkpoints.save(path, PROGRESS, stack, optimizer, {"noise": generator.get_state()})

    other = fresh(tmp_path, *settings)
    other_optimizer, other_generator = OPTIMIZERS[kind](other), torch.Generator()
    saved = checkpoints.load(path)
    assert saved is not None
    assert saved.progress == PROGRESS
    assert saved.optimizer_kind.lower() == kind
    other.load_state_dict(saved.stack)
    other_optimizer.load_state_dict(saved.optimizer)
    other_generator.set_state(saved.generators["noise"])
    for _ in range(3):
        step(stack, optimizer, generator)
        step(other, other_optimizer, other_generator)
    for name, tensor in stack.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_before_the_first_step_there_is_nothing_to_keep_of_the_optimizer(tmp_path: Path) -> None:
    stack = fresh(tmp_path)
    checkpoints.save(tmp_path / "c", Progress(), stack, OPTIMIZERS["adam"](stack), {})
    saved = checkpoints.load(tmp_path / "c")
    assert saved is not None
    assert (saved.optimizer["state"], saved.generators) == ({}, {})
    OPTIMIZERS["adam"](stack).load_state_dict(saved.optimizer)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert checkpoints.load(tmp_path / "none") is None


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    stack = fresh(tmp_path)
    checkpoints.save(path, PROGRESS, stack, OPTIMIZERS["adam"](stack), {})
    whole, tensors = path.read_bytes(), safetensors.torch.load(path.read_bytes())
    with safe_open(path, "pt") as opened:
        described = json.loads(opened.metadata()["progress"])
    for content in (b"", b"nonsense", whole[:-7]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"checkpoint.safetensors"):
            checkpoints.load(path)
    for names, text in (
        (tensors, "{"),
        (tensors, json.dumps({**described, "progress": {"steps": 1}})),
        (tensors, json.dumps({"progress": vars(PROGRESS)})),
        (tensors | {"other.x": torch.zeros(1)}, json.dumps(described)),
        (tensors | {"optimizer.x.y": torch.zeros(1)}, json.dumps(described)),
    ):
        safetensors.torch.save_file(names, path, {"progress": text})
        with pytest.raises(CheckpointError):
            checkpoints.load(path)
