"""What `--model` names: read once, here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.models.weight_files import ModelError

Kind = Literal["name", "timm", "hf-hub", "torch.export", "torchscript", "onnx", "code"]
_PREFIXES: dict[str, Kind] = {"timm": "timm", "hf-hub": "hf-hub"}
_SUFFIXES: dict[str, Kind] = {
    ".pt2": "torch.export",
    ".onnx": "onnx",
    ".ts": "torchscript",
    ".torchscript": "torchscript",
    ".pt": "torchscript",
    ".pth": "torchscript",
}
_CODE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True)
class ModelName:
    """A source and its name there: an architecture, a repository, a file, or `module:function`."""

    kind: Kind
    name: str


def parse_name(text: str) -> ModelName:
    """Read `--model`.

    Raises:
        ModelError: it is none of the forms there are.
    """
    prefix, colon, rest = text.partition(":")
    if colon and prefix in _PREFIXES:
        if not rest:
            raise ModelError(f"'{text}' names no model after '{prefix}:'")
        return ModelName(_PREFIXES[prefix], rest)
    suffix = Path(text).suffix.lower()
    if suffix in _SUFFIXES:
        return ModelName(_SUFFIXES[suffix], text)
    if suffix == ".safetensors":
        raise ModelError(f"'{text}' holds weights: name their architecture, and give the file as --weights")
    if _CODE.fullmatch(text):
        return ModelName("code", text)
    if colon or "/" in text or "\\" in text:
        raise ModelError(
            f"'{text}' names no model: give a name of ours or torchvision's, timm:NAME, hf-hub:REPO[@REVISION], a file "
            "(.pt2, .onnx, .ts, .torchscript, .pt), or module:function"
        )
    return ModelName("name", text)
