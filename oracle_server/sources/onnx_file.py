"""An ONNX file, computed by ONNX Runtime as it is: torch has none of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from oracle_server.onnx_session import open_session
from oracle_server.sources.extras import need
from oracle_server.sources.network import Network
from oracle_server.sources.program import Program, check_file, file_digest
from shared.models.weight_files import ModelError

_FLOAT = "tensor(float)"


class _Session(nn.Module):
    """Images float32 [n, ...], on the CPU -> the one output of a session."""

    def __init__(self, session: Any, name: str) -> None:
        super().__init__()
        self._session, self._name = session, name

    def forward(self, images: Tensor) -> Tensor:
        try:
            answers = self._session.run(None, {self._name: images.contiguous().numpy()})[0]
        except Exception as error:  # they have no base of their own, and others handle what torch's layers raise
            raise RuntimeError(f"ONNX Runtime: {(str(error) or repr(error)).splitlines()[0]}") from error
        return torch.from_numpy(answers)

    def __deepcopy__(self, memo: Mapping[int, object]) -> Self:
        return self  # a session cannot be copied and need not: it has no state, and threads may share it


def load_onnx(path: Path, weights: str | None) -> Network:
    """The graph in an ONNX file, with the files of tensors that it names beside it.

    Raises:
        ModelError: ONNX Runtime is not installed or cannot load the file, or the graph is not one that maps one
            float32 tensor of images to one float32 tensor.
    """
    check_file(path, weights)
    for package in ("onnxruntime", "onnx"):
        need(package, "onnxruntime", f"an ONNX file ({path})")
    try:
        files = (path, *_beside(path))
        session = open_session(path)
    except ModelError:
        raise
    except Exception as error:  # neither package's exceptions have a base of their own
        raise ModelError(f"{path} cannot be read as ONNX: {(str(error) or repr(error)).splitlines()[0]}") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelError(
            f"{path} has inputs {_names(inputs)} and outputs {_names(outputs)}: export a graph with one of each: "
            "images and logits"
        )
    for what, value in (("input", inputs[0]), ("output", outputs[0])):
        if value.type != _FLOAT:
            raise ModelError(f"{path} has an {what} of type {value.type}: export it for float32")
    if len(inputs[0].shape) != 4:
        raise ModelError(f"{path} reads tensors of shape {inputs[0].shape}: export one that reads images [n, c, h, w]")
    rows, *shape = (size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape)
    module = Program(_Session(session, inputs[0].name), file_digest(*files), rows or 1, rows)
    return Network(module, (shape[0], shape[1], shape[2]), bound="onnxruntime", files=files)


def count_parameters(path: Path) -> int:
    """Numbers in an ONNX graph's initializers; `onnx` must be installed."""
    import math

    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return sum(math.prod(tensor.dims) for tensor in graph.initializer)


def _beside(path: Path) -> list[Path]:
    """The files of tensors that a graph names: in its own folder or below.

    Raises:
        ModelError: one of them is elsewhere, or is not there.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    names = {entry.value for x in graph.initializer for entry in x.external_data if entry.key == "location"}
    folder, found = path.parent.resolve(), []
    for name in sorted(names):
        file = path.parent / name
        if not file.resolve().is_relative_to(folder):
            raise ModelError(f"{path} names a file of tensors outside its folder: {name}")
        if not file.is_file():
            raise ModelError(f"{path} keeps its tensors in {name}, which is not beside it")
        found.append(file)
    return found


def _names(values: Any) -> str:
    return ", ".join(value.name for value in values) or "none"
