"""A `.pt2` file of a stranger: nothing in it is unpickled, evaluated or loaded as machine code."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sources_support import SHAPE, tiny, write_export

from oracle_server.sources.export_archive import check_archive
from oracle_server.sources.torch_export import load_export
from shared.models.weight_files import ModelError

GRAPH = "models/model.json"
Entries = dict[str, bytes]


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tiny(), tmp_path_factory.mktemp("pt2") / "sound.pt2")


def entries_of(path: Path) -> Entries:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def packed(entries: Entries) -> bytes:
    """As torch writes an archive, which aligns what it holds."""
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    for name, content in entries.items():
        if not name.startswith(".data/") and name not in ("byteorder", "version"):
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return file.getvalue()


def edited(entries: Entries, change: Callable[[Any], None], name: str = GRAPH) -> Entries:
    document = json.loads(entries[name])
    change(document)
    return entries | {name: json.dumps(document).encode()}


def pickled_weight(entries: Entries, trap: Trap) -> Entries:
    def change(config: Any) -> None:
        config["config"]["last.bias"]["use_pickle"] = True

    config = "data/weights/model_weights_config.json"
    weight = json.loads(entries[config])["config"]["last.bias"]["path_name"]
    return edited(entries, change, config) | {f"data/weights/{weight}": _saved(trap)}


def pickled_constant(entries: Entries, trap: Trap) -> Entries:
    def change(config: Any) -> None:
        config["config"]["c"] = {
            "path_name": "opaque_obj_0",
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }

    config = "data/constants/model_constants_config.json"
    return edited(entries, change, config) | {"data/constants/opaque_obj_0": pickle.dumps(trap)}


def pickled_samples(entries: Entries, trap: Trap) -> Entries:
    return entries | {"data/sample_inputs/model.pt": _saved((trap, {}))}


def legacy_weights(entries: Entries, trap: Trap) -> Entries:
    return entries | {"data/weights/model.pt": _saved({"a": trap})}


def evaluated_size(entries: Entries, trap: Trap) -> Entries:
    code = f"__import__('pathlib').Path({str(trap.path)!r}).touch() or Symbol('s77')"

    def change(program: Any) -> None:
        _replace_size(program["graph_module"]["graph"], code)

    return edited(entries, change)


def executed_name(entries: Entries, trap: Trap) -> Entries:
    code = f"x, __import__('pathlib').Path({str(trap.path)!r}).touch()"

    def change(program: Any) -> None:
        program["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [code]

    return edited(entries, change)


def imported_enum(entries: Entries, trap: Trap) -> Entries:
    def change(program: Any) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        spec = json.loads(signature["in_spec"])
        spec[1]["children_spec"][1]["context"] = json.dumps([{"__enum__": True, "fqn": "antigravity:a", "name": "b"}])
        signature["in_spec"] = json.dumps(spec)

    return edited(entries, change)


def mapped_file(entries: Entries, trap: Trap) -> Entries:
    def change(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"

    return edited(entries, change)


def machine_code(entries: Entries, trap: Trap) -> Entries:
    return entries | {"data/aotinductor/model/a.so": b"\x7fELF"}


def _saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _replace_size(value: Any, code: str) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            if name == "expr_str":
                value[name] = code
            else:
                _replace_size(item, code)
    elif isinstance(value, list):
        for item in value:
            _replace_size(item, code)


def test_a_sound_file_is_read_and_written_again_it_still_is(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "again.pt2").write_bytes(packed(entries_of(sound)))
    images = torch.rand(3, *SHAPE)
    for path in (sound, tmp_path / "again.pt2"):
        torch.testing.assert_close(load_export(path, None).module(images), tiny()(images))


@pytest.mark.parametrize(
    ("spoil", "message", "springs"),
    [
        (pickled_weight, "pickled", True),
        (pickled_constant, "more than tensors", True),
        (pickled_samples, "sample inputs", True),
        (legacy_weights, "more than tensors", True),
        (evaluated_size, "no arithmetic", True),
        (executed_name, "where a name belongs", False),
        (imported_enum, "other inputs", False),
        (mapped_file, "not among the operators", False),
        (machine_code, "more than tensors", False),
    ],
)
def test_what_would_run_is_refused_before_torch_reads_it(
    spoil: Callable[[Entries, Trap], Entries], message: str, springs: bool, sound: Path, tmp_path: Path
) -> None:
    trap = Trap(tmp_path / "sprung")
    path = tmp_path / "spoilt.pt2"
    path.write_bytes(packed(spoil(entries_of(sound), trap)))
    with pytest.raises(ModelError, match=message):
        load_export(path, None)
    assert not trap.path.exists()
    if springs:  # the danger is real: torch by itself walks into it
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("logging.Logger.warning", lambda *_args, **_more: None)
            with contextlib.suppress(Exception):
                torch.export.load(io.BytesIO(path.read_bytes())).module()
        assert trap.path.exists()


def test_sizes_are_arithmetic_or_refused(sound: Path) -> None:
    entries = entries_of(sound)
    for expression in (
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(96), Symbol('s77', positive=True, integer=True))",
        "2*s77 + 1",
        "FloorDiv(s77, 2)",
        "1.5*s0",
    ):
        check_archive(packed(edited(entries, lambda p, e=expression: _replace_size(p, e))), "it")  # type: ignore[misc]
    for expression in (
        "exit(1)",
        "s77.__class__",
        "Symbol('s77', positive=exit())",
        "[s77]",
        "'s77'",
        "open(0)",
        "lambda: 1",
        "Symbol('a b')",
        "s77 if s77 else 1",
    ):
        with pytest.raises(ModelError, match="no arithmetic"):
            check_archive(packed(edited(entries, lambda p, e=expression: _replace_size(p, e))), "it")  # type: ignore[misc]
