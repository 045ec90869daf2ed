"""A classifier of any kind, served over a real socket: it answers as the same network does in process."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_support import logits_of, refused, running
from safetensors.torch import save_file
from sources_support import (
    CLASSES,
    SHAPE,
    Probabilities,
    tiny,
    write_export,
    write_onnx,
    write_script,
)
from torch import Tensor, nn

from oracle_server.engines import BlockEngine, build_engine
from oracle_server.loading import load_classifier
from oracle_server.settings import Settings
from oracle_server.sources.naming import ModelName, parse_name
from shared.models.autoencoder import Autoencoder, pyramid
from shared.models.decoder import decoder_of, write
from shared.models.layers import build
from shared.models.weight_files import ModelError
from shared.wire import codec, protocol

CODE = """
from sources_support import tiny

def network():
    return tiny().train()

def blank():
    made = network()
    made.last.weight.data.zero_()
    return made

def nothing():
    return {"a": 1}

def failing():
    raise OSError("no such disk")

def asking(depth):
    pass

class Branching(type(tiny())):
    def forward(self, images):
        if len(images) > 1:
            raise TypeError("one at a time")
        return super().forward(images)
"""
FILES = {
    "export": "export.pt2",
    "export of 2": "export2.pt2",
    "onnx": "any.onnx",
    "onnx of 1": "one.onnx",
    "onnx of 3": "three.onnx",
    "traced": "traced.pt",
    "scripted": "scripted.ts",
    "frozen": "frozen.torchscript",
    "code": "tiny_network:network",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One network in each form, and code that makes it."""
    folder, network = tmp_path_factory.mktemp("sources"), tiny()
    write_export(network, folder / FILES["export"])
    write_export(network, folder / FILES["export of 2"], rows=2)
    write_onnx(network, folder / FILES["onnx"])
    write_onnx(network, folder / FILES["onnx of 1"], rows=1)
    write_onnx(network, folder / FILES["onnx of 3"], rows=3)
    for kind in ("traced", "scripted", "frozen"):
        write_script(network, folder / FILES[kind], kind)
    save_file(network.state_dict(), folder / "tiny.safetensors")
    (folder / "tiny_network.py").write_text(CODE)
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as the working directory; modules that were found there are forgotten."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(folder)])
    monkeypatch.delitem(sys.modules, "tiny_network", raising=False)
    return folder


def options(kind: str) -> dict[str, object]:
    """TorchScript does not say what it reads."""
    scripts = {"channels": 3, "image_size": 12}
    return {"model": FILES[kind]} | (scripts if kind in ("traced", "scripted", "frozen", "code") else {})


@pytest.mark.parametrize("kind", FILES)
def test_it_answers_over_http_as_in_process_whatever_it_is_asked_with(kind: str, here: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((11, *SHAPE), dtype=np.float32)
    settings = Settings(**options(kind), ledger=str(tmp_path / "ledger.db"), engine_block=4)
    with running(settings) as server:
        caller = server.caller(100)
        logits = logits_of(caller.infer(images))
        alone = np.concatenate([logits_of(caller.infer(images[[row]])) for row in (0, 4, 10)])
        refused(caller.infer(images[:, :1]), 400, "malformed-request")
        assert caller.budget()["spent"] == 14
    expected = tiny()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(alone.view(np.int32), logits[[0, 4, 10]].view(np.int32))


@pytest.mark.parametrize("kind", ["onnx of 3", "export of 2", "export"])
def test_more_images_than_a_program_takes_go_in_pieces_and_fewer_are_filled_up(kind: str, here: Path) -> None:
    module = load_classifier(Settings(**options(kind))).module
    images = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(1))
    for rows in (1, 2, 3, 4, 9, 20):
        torch.testing.assert_close(module(images[:rows]), tiny()(images[:rows]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["onnx", "export"])
def test_a_clients_decoder_comes_before_a_program_too(kind: str, here: Path, tmp_path: Path) -> None:
    spec, state = decoder_of(Autoencoder(pyramid(SHAPE, 6, 4)))
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.2 * torch.randn(x.shape, generator=generator) for name, x in state.items()}
    latents = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    settings = Settings(**options(kind), ledger=str(tmp_path / "ledger.db"), engine_block=4, allow_decoders=True)
    with running(settings) as server:
        caller = server.caller(100)
        known = caller.http.post(protocol.DECODERS_ROUTE, content=write(spec, state), headers=caller.headers)
        asked = codec.encode_request({"latents": latents}, parameters={"decoder": known.json()["decoder"]})
        logits = logits_of(caller.post(asked))
    decoder = build(spec.layers)
    decoder.load_state_dict(state)
    with torch.no_grad():
        expected = tiny()(decoder.eval()(torch.from_numpy(latents))).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_the_weights_of_code_may_lie_in_a_file(here: Path) -> None:
    images = torch.rand(2, *SHAPE)
    for weights, expected in ((None, False), ("tiny.safetensors", True)):
        found = load_classifier(Settings(model="tiny_network:blank", image_size=12, weights=weights))
        assert torch.allclose(found.module(images), tiny()(images), atol=1e-6) is expected
        assert not found.module.training


def test_what_code_computes_is_measured_at_each_start(here: Path, tmp_path: Path) -> None:
    settings = Settings(**options("code"), engine="eager", engine_block=2, engine_cache=tmp_path / "cache")
    build_engine(load_classifier(settings), settings)
    assert not (tmp_path / "cache").exists()


def test_a_program_is_computed_by_its_own_engine_alone(here: Path, tmp_path: Path) -> None:
    for kind, engine, others in (
        ("onnx", "onnxruntime", ("eager", "compile")),
        ("export", "eager", ("compile", "onnxruntime")),
        ("frozen", "eager", ("compile", "onnxruntime")),
    ):
        model = load_classifier(Settings(**options(kind)))
        built = build_engine(model, Settings(engine=engine, engine_block=2, engine_cache=tmp_path))  # type: ignore[arg-type]
        assert isinstance(built, BlockEngine)
        assert built.name == engine
        for other in others:
            with pytest.raises(ModelError, match=f"--engine {other}: .* only {engine} can compute"):
                build_engine(model, Settings(engine=other))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="float32 on the CPU"):
        build_engine(load_classifier(Settings(**options("onnx"))), Settings(precision="bfloat16"))


def test_two_programs_are_not_taken_for_each_other(here: Path, tmp_path: Path) -> None:
    """A frozen program has no weights to tell it by: what was measured of one is not another's."""
    torch.manual_seed(1)
    other = tiny()
    nn.init.normal_(other.last.weight)
    write_script(other, tmp_path / "other.pt", "frozen")
    for model in (FILES["frozen"], str(tmp_path / "other.pt"), FILES["frozen"]):
        settings = Settings(**options("frozen") | {"model": model}, engine_block=2, engine_cache=tmp_path / "cache")
        build_engine(load_classifier(settings), settings)
    assert len(list((tmp_path / "cache").iterdir())) == 2


class BatchStatistics(nn.Module):
    """Batch statistics instead of learnt ones: an answer depends on what it was asked with."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny().train()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def test_answers_that_depend_on_company_are_never_given_in_company(tmp_path: Path) -> None:
    write_script(BatchStatistics().train(), tmp_path / "m.pt")
    settings = Settings(model=str(tmp_path / "m.pt"), channels=3, image_size=12, engine_block=8)
    engine = build_engine(load_classifier(settings), settings)
    assert isinstance(engine, BlockEngine)
    assert engine.ladder.sizes == (1,)


def test_names_are_read_once() -> None:
    for text, kind, name in (
        ("resnet18", "name", "resnet18"),
        ("timm:resnet18.a1_in1k", "timm", "resnet18.a1_in1k"),
        ("hf-hub:timm/resnet18@v1", "hf-hub", "timm/resnet18@v1"),
        ("models/m.pt2", "torch.export", "models/m.pt2"),
        ("m.ONNX", "onnx", "m.ONNX"),
        ("m.pt", "torchscript", "m.pt"),
        ("a.b:make", "code", "a.b:make"),
    ):
        assert parse_name(text) == ModelName(kind, name)  # type: ignore[arg-type]


def test_every_mistake_is_told(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.onnx").write_text("no graph")
    (tmp_path / "text.pt2").write_text("no program")
    (tmp_path / "text.ts").write_text("no script")
    torch.save(tiny().state_dict(), tmp_path / "state.pt")
    write_onnx(Probabilities(tiny()), tmp_path / "p.onnx")
    (tmp_path / "p.toml").write_text('output = "log-probabilities"')
    at = str(tmp_path)
    small = {"channels": 3, "image_size": 12}
    for given, message in (
        ({"model": "a:b:c"}, "names no model"),
        ({"model": "timm:"}, "after 'timm:'"),
        ({"model": "w.safetensors"}, "as --weights"),
        ({"model": "none.onnx"}, "there is no file"),
        ({"model": "none.pt2"}, "there is no file"),
        ({"model": f"{at}/text.onnx"}, "cannot be read as ONNX"),
        ({"model": f"{at}/text.pt2"}, "no archive of torch.export.save"),
        ({"model": f"{at}/text.ts"}, "no TorchScript program"),
        ({"model": f"{at}/state.pt"}, "give the file as --weights"),
        ({"model": "traced.pt"}, "--channels"),
        ({"model": "traced.pt", "channels": 3}, "--image-size"),
        ({"model": "traced.pt", "channels": 3, "image_size": 30}, "cannot read images"),
        ({"model": "any.onnx", "weights": "w.pt"}, "leave out --weights"),
        ({"model": "any.onnx", "channels": 1}, "3 channels, not 1"),
        ({"model": "any.onnx", "classes": 4}, f"{CLASSES} classes, not 4"),
        ({"model": "any.onnx", "image_size": 16}, r"resize = \[12, 12\]"),
        ({"model": "any.onnx", "preprocessing": tmp_path / "p.toml"}, "does not answer with log-probabilities"),
        ({"model": f"{at}/p.onnx", "mean": (0.5,)}, "--mean has 1 values"),
        ({"model": "no_such_module:f"}, "there is no module no_such_module"),
        ({"model": "tiny_network:none"}, "has no function none"),
        ({"model": "tiny_network:nothing"}, "must return a torch.nn.Module"),
        ({"model": "tiny_network:failing"}, "OSError: no such disk"),
        ({"model": "tiny_network:asking"}, "called without arguments"),
        ({"model": "tiny_network:Branching", **small}, "one at a time.*dynamic batch axis"),
        ({"model": "tiny_network:network", **small, "weights": f"{at}/none.pt"}, "there is no weights file"),
    ):
        with pytest.raises(ModelError, match=message):
            load_classifier(Settings(**given))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"any.onnx\) needs .*'onnxruntime'.*pip install 'zo-defense\[onnxruntime\]'"):
        load_classifier(Settings(model="any.onnx"))


def test_answers_that_look_like_probabilities_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_onnx(Probabilities(tiny()), tmp_path / "p.onnx")
    load_classifier(Settings(model=str(tmp_path / "p.onnx")))
    assert "look like probabilities" in caplog.text
    caplog.clear()
    (tmp_path / "p.toml").write_text('output = "probabilities"')
    found = load_classifier(Settings(model=str(tmp_path / "p.onnx"), preprocessing=tmp_path / "p.toml"))
    assert not caplog.records
    images = torch.rand(4, *SHAPE)
    torch.testing.assert_close(found.module(images), tiny()(images).log_softmax(1), rtol=0, atol=1e-5)


def test_an_onnx_file_may_keep_its_tensors_beside_it_and_nowhere_else(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(write_onnx(tiny(), tmp_path / "whole.onnx"))
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "m.onnx"
    onnx.save(graph, path, save_as_external_data=True, location="m.data", size_threshold=0)
    images = torch.rand(2, *SHAPE)
    torch.testing.assert_close(load_classifier(Settings(model=str(path))).module(images), tiny()(images))
    (path.parent / "m.data").rename(tmp_path / "m.data")
    with pytest.raises(ModelError, match=r"keeps its tensors in m\.data"):
        load_classifier(Settings(model=str(path)))
    graph = onnx.load(str(path), load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../m.data" if entry.key == "location" else entry.value
    onnx.save(graph, path)
    with pytest.raises(ModelError, match="outside its folder"):
        load_classifier(Settings(model=str(path)))
