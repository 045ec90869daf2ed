"""What was measured at an earlier start, so that the next one need not.

One small JSON file for each model, machine, set of libraries and settings. Nothing depends on it: a file that is not
there, not readable or not ours means that it is measured again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from oracle_server.engines.ladder import Ladder
from oracle_server.settings import Settings
from shared.version import VERSION

_FORMAT = 1
# Variables by which the libraries choose kernels.
_CHOOSING = ("MKL_", "ONEDNN_", "DNNL_", "OMP_", "KMP_", "ORT_", "ATEN_", "TORCH_", "CUBLAS_", "CUDNN_", "NVIDIA_TF32")


class Measured(BaseModel):
    """What a start found out. `rates` images a second of each candidate; `difference` max |answer - eager's|."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    sizes: tuple[int, ...]
    rate: float
    shape: tuple[int, ...]
    spread: float
    rates: dict[str, float]
    difference: float

    @property
    def ladder(self) -> Ladder:
        return Ladder(self.sizes, self.rate, self.shape, self.spread)


def folder_of(settings: Settings) -> Path | None:
    """Where the files lie; None where there is no home to put them in."""
    if settings.engine_cache is not None:
        return settings.engine_cache
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zo-defense"
    except RuntimeError:
        return None


def key_of(module: nn.Module, shape: tuple[int, ...], settings: Settings, device: torch.device, threads: int) -> str:
    """A digest of all that the answers' bits or speed depend on: model and weights, machine, libraries, settings."""
    digest = hashlib.sha256()
    said = {
        "format": _FORMAT,
        "versions": [VERSION, torch.__version__, _version("torchvision"), _version("onnxruntime"), _version("onnx")],
        "machine": [platform.machine(), _cpu(), threads, _gpu(device)],
        "settings": settings.model_dump(mode="json", include={"engine", "engine_block", "precision", "tf32"}),
        "variables": sorted((k, v) for k, v in os.environ.items() if k.startswith(_CHOOSING)),
        "model": [repr(module), shape],
    }
    digest.update(json.dumps(said, sort_keys=True).encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(folder: Path | None, key: str) -> Measured | None:
    if folder is None:
        return None
    try:
        found = Measured.model_validate_json((folder / _name(key)).read_bytes())
    except (OSError, ValidationError):
        return None
    in_order = found.sizes == tuple(sorted(set(found.sizes)))
    return found if found.sizes and found.sizes[0] >= 1 and in_order else None


def save(folder: Path | None, key: str, measured: Measured) -> None:
    """Whole or not at all: servers may start at the same time."""
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=folder, prefix=".engine-")
        try:
            with open(descriptor, "w") as file:
                file.write(measured.model_dump_json(indent=1))
            os.replace(partial, folder / _name(key))
        except BaseException:
            os.unlink(partial)
            raise


@contextlib.contextmanager
def alone(folder: Path | None) -> Iterator[None]:
    """One server of this folder at a time: those that start together then share one measurement, and so one engine.

    Two that choose for themselves may choose differently, and what answers differ by is noise to a client that takes
    differences of them. Where there is no folder to lock in, each is for itself.
    """
    with contextlib.ExitStack() as stack:
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _name(key: str) -> str:
    return f"engine-{key[:32]}.json"


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """The first core as Linux describes it, flags included; the clock's momentary speed is left out."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor()
    return "\n".join(line for line in first.splitlines() if not line.startswith(("cpu MHz", "bogomips", "BogoMIPS")))


def _gpu(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
