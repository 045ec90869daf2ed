"""A program of `torch.export`, in a `.pt2` file, with the batch sizes that it was exported for."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from oracle_server.sources.export_archive import check_archive
from oracle_server.sources.network import Network
from oracle_server.sources.program import Program, check_file, file_digest
from shared.models.weight_files import ModelError


def load_export(path: Path, weights: str | None) -> Network:
    """The program in a file of `torch.export.save`, of which nothing is unpickled or evaluated.

    Raises:
        ModelError: no such file; not an exported program of tensors and operators alone; or one that does not map
            images, float32 [n, ...], to something.
    """
    check_file(path, weights)
    content = path.read_bytes()
    check_archive(content, str(path))
    try:
        with _quiet():
            # What was checked, and not what the file may have become meanwhile.
            program = torch.export.load(io.BytesIO(content))
            # Without what checks its inputs by evaluating text of the file: `Program` keeps to the sizes.
            module = program.module(check_guards=False)
    except Exception as error:  # torch promises no particular type
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ModelError(f"{path} cannot be read as an exported program: {reason}") from error
    least, most, shape = _input(program, path)
    compiled = Program(module.requires_grad_(False), file_digest(path), least, most)
    return Network(compiled, shape, bound="eager", files=(path,))


def _input(program: Any, path: Path) -> tuple[int, int | None, tuple[int | None, int | None, int | None]]:
    """The fewest and the most images at once, and the shape of one, of a program's one input."""
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    example = nodes[names[0]].meta.get("val") if len(names) == 1 and names[0] in nodes else None
    if not isinstance(example, torch.Tensor) or example.ndim != 4 or example.dtype != torch.float32:
        raise ModelError(f"{path} does not read one tensor of images, float32 [n, c, h, w]: export one that does")
    rows, *sizes = example.shape
    shape = tuple(size if isinstance(size, int) else None for size in sizes)
    if isinstance(rows, int):
        return rows, rows, (shape[0], shape[1], shape[2])
    allowed = program.range_constraints.get(rows.node.expr)
    least, most = (1, None) if allowed is None else (_finite(allowed.lower) or 1, _finite(allowed.upper))
    return max(1, least), most, (shape[0], shape[1], shape[2])


def _finite(bound: Any) -> int | None:
    """An end of a range, a number of sympy's; None for what stands for infinity, or is past any batch."""
    return int(bound) if 0 <= bound < 2**31 else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loader's tracebacks in the log: the error says it."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
