"""A training run's whole state in one safetensors file: weights, optimizer, random generators, position, queries.

Tensors: `stack.*`, `optimizer.{parameter}.{name}`, `generator.{name}` (uint8), `beside.*` (what
only some runs have). The rest is JSON in the file's metadata.
Written to a temporary file and renamed, so a kill at any moment leaves the previous checkpoint or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from defender_client.stack import Stack, write_safetensors

CHECKPOINT_FILE = "checkpoint.safetensors"
_METADATA = "progress"


class CheckpointError(ValueError):
    """The checkpoint cannot be read, or belongs to another run."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done in all.
        epoch: epochs done.
        batch: batches done within the current epoch.
        queries: queries spent by this run so far, in all (labels, training, validation).
        best: best quality on the validation split so far; None before the first validation.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    queries: int = 0
    best: float | None = None


def save(
    path: Path,
    progress: Progress,
    stack: Stack,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Tensor],
    beside: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint; `generators` maps names to generator states (uint8 tensors), `beside` names to what else the
    run has."""
    tensors = {f"stack.{name}": tensor.contiguous() for name, tensor in stack.state_dict().items()}
    state = optimizer.state_dict()
    for index, values in state["state"].items():
        for name, value in values.items():
            if value is not None:
                tensors[f"optimizer.{index}.{name}"] = value.contiguous()
    for name, value in generators.items():
        tensors[f"generator.{name}"] = value
    for name, value in (beside or {}).items():
        tensors[f"beside.{name}"] = value
    described = {
        "progress": vars(progress),
        "optimizer": {"kind": type(optimizer).__name__, "groups": state["param_groups"]},
    }
    write_safetensors(tensors, path, {_METADATA: json.dumps(described)})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read."""

    progress: Progress
    stack: dict[str, torch.Tensor]
    optimizer_kind: str
    optimizer: dict[str, Any]
    generators: dict[str, torch.Tensor]
    beside: dict[str, torch.Tensor]

    def beside_of(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of one part of what stands beside the stack, by their names in it."""
        prefix = f"{part}."
        return {name.removeprefix(prefix): value for name, value in self.beside.items() if name.startswith(prefix)}


def load(path: Path) -> Checkpoint | None:
    """Read a checkpoint; None if there is none, CheckpointError if it cannot be read."""
    try:
        with safe_open(path, "pt") as opened:
            described = json.loads((opened.metadata() or {})[_METADATA])
        tensors = safetensors.torch.load_file(path)
        parts: dict[str, dict[str, torch.Tensor]] = {"stack": {}, "optimizer": {}, "generator": {}, "beside": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        return Checkpoint(
            progress=Progress(**described["progress"]),
            stack=parts["stack"],
            optimizer_kind=described["optimizer"]["kind"],
            optimizer={"state": state, "param_groups": described["optimizer"]["groups"]},
            generators=parts["generator"],
            beside=parts["beside"],
        )
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from None
