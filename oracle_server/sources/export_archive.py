"""Whether a `.pt2` file is tensors and a graph of operators, and nothing else: looked at before torch loads it.

`torch.export.load` unpickles some kinds of weights and constants and, where its safe reading fails, the sample inputs;
loads machine code (AOTInductor); evaluates expressions of sizes as Python (`sympy.sympify`); and makes Python of the
graph's names. Each is refused here unless it is harmless: nothing of a file is unpickled or evaluated that is not a
tensor, a name or arithmetic on sizes. What remains is a program of PyTorch's operators.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

import torch

from shared.models.weight_files import ModelError

_EXPECTED = re.compile(
    r"models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt"
    r"|extra/[^/]+"
    r"|archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)|\.format_version"
    r"|\.storage_alignment"
)
_SAMPLES = "data/sample_inputs/model.pt"
_NAME = re.compile(r"[\w.]*", re.ASCII)
# Text that torch keeps and does not run: where a node came from, a text among an operator's arguments, versions; and
# the guards, which run only where they are asked for.
_UNREAD = frozenset({"metadata", "guards_code", "torch_version", "as_string", "as_strings"})
_SPECS = frozenset({"in_spec", "out_spec"})  # JSON: how inputs and outputs are nested
_NESTING = frozenset(
    {"type", "context", "children_spec", "builtins.tuple", "builtins.list", "builtins.dict", "null", "[]"}
)
_EXPRESSION = "expr_str"
_DECLARED = re.compile(r"Symbol\('([a-z]+\d+)'(?:, [a-z]+=True)*\)", re.ASCII)
_ARITHMETIC = re.compile(r"(?:[\s\d+\-*/%(),<>=!&|~]|(?<=\d)\.(?=\d)|[A-Za-z]\w*)*", re.ASCII)
_WORD = re.compile(
    r"[a-z]+\d+|Integer|Rational|True|False|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|IntTrueDiv"
    r"|Eq|Ne|Equality|Unequality|LessThan|StrictLessThan|GreaterThan|StrictGreaterThan|And|Or|Not",
    re.ASCII,
)
_OPERATORS = re.compile(r"torch\.ops\.(aten|torchvision|prims|_c10d_functional)\.\w+\.\w+|_operator\.\w+|math\.\w+")
_OF_FILES = frozenset({"from_file", "save", "load"})


def check_archive(content: bytes, name: str) -> None:
    """Raise `ModelError` unless it is safe to give this file's bytes to `torch.export.load`.

    Args:
        content: of the whole file.
        name: what to call it in an error.
    """
    try:
        # The reader that torch itself uses: another one might see other entries in the same bytes.
        reader = torch._C.PyTorchFileReader(io.BytesIO(content))
        entries = {entry: reader.get_record(entry) for entry in reader.get_all_records()}
    except RuntimeError as error:
        raise ModelError(f"{name} is no archive of torch.export.save") from error
    if "models/model.json" not in entries:
        raise ModelError(f"{name} holds no program of torch.export.save (of torch 2.8 or later)")
    odd = [entry for entry in entries if not _EXPECTED.fullmatch(entry)]
    if odd:
        raise ModelError(f"{name} holds more than tensors and a graph: {odd[0]}; it is not read")
    try:
        for kind in ("weights", "constants"):
            _check_tensors(json.loads(entries.get(f"data/{kind}/model_{kind}_config.json", b"{}")), name)
        _check_graph(json.loads(entries["models/model.json"]), name)
    except (ValueError, AttributeError, TypeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{name} holds a graph that cannot be read") from error
    if samples := entries.get(_SAMPLES):
        try:
            torch.load(io.BytesIO(samples), map_location="cpu", weights_only=True)
        except Exception as error:  # it promises no particular type
            raise ModelError(
                f"{name} has sample inputs that are not tensors: they are pickled, and not read"
            ) from error


def _check_tensors(config: dict[str, Any], name: str) -> None:
    for tensor, entry in config.get("config", {}).items():
        if entry.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
            raise ModelError(f"{name} has '{tensor}' pickled: nothing is unpickled here; export it as a plain tensor")
        if not _NAME.fullmatch(tensor):
            raise ModelError(f"{name} calls a tensor {tensor!r}: that is no name")


def _check_graph(program: dict[str, Any], name: str) -> None:
    for key, text in _texts(program, ""):
        if key == _EXPRESSION:
            plain = _DECLARED.sub(r"\1", text)
            words = re.findall(r"[A-Za-z]\w*", plain)
            if not _ARITHMETIC.fullmatch(plain) or not all(_WORD.fullmatch(word) for word in words):
                raise ModelError(f"{name} has a size that is no arithmetic: {text[:80]!r}")
        elif key in _SPECS:
            if not {part for _, part in _texts(json.loads(text), "")} <= _NESTING:
                raise ModelError(f"{name} has other inputs and outputs than tensors: export one of each, by position")
        elif not _NAME.fullmatch(text):
            raise ModelError(f"{name} has {text[:80]!r} where a name belongs")
        elif key == "target" and (not _OPERATORS.fullmatch(text) or text.split(".")[-2] in _OF_FILES):
            raise ModelError(f"{name} uses {text}, which is not among the operators that are served")


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text within, with the key it stands under; keys too, which name tensors and symbols."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield "", name
            if name not in _UNREAD:
                yield from _texts(item, name)
