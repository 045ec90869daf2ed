"""What is declared in a file happens on the server, and clients always send images in [0, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_support import logits_of, refused, running
from sources_support import ChannelsLastInput, tiny, write_onnx
from torchvision.transforms import v2

from oracle_server.engines import BlockEngine, build_engine
from oracle_server.loading import load_classifier, load_hidden
from oracle_server.settings import Settings
from oracle_server.sources.preprocessing import Preprocessing, read_preprocessing
from shared.models.weight_files import ModelError

FILE = """
size = [20, 16]
resize = 12
interpolation = "bilinear"
range = 255
mean = [103.9, 116.8, 123.7]
std = [57.4, 57.1, 58.4]
channels = "bgr"
layout = "nhwc"
"""


def test_all_of_it_over_http(tmp_path: Path) -> None:
    height_width = (12, 12, 3)
    write_onnx(ChannelsLastInput(tiny()), tmp_path / "m.onnx", shape=height_width)
    (tmp_path / "p.toml").write_text(FILE)
    images = np.random.default_rng(0).random((6, 3, 20, 16), dtype=np.float32)
    settings = Settings(
        model=str(tmp_path / "m.onnx"), preprocessing=tmp_path / "p.toml", ledger=str(tmp_path / "l.db"), engine_block=4
    )
    with running(settings) as server:
        caller = server.caller(100)
        logits = logits_of(caller.infer(images))
        refused(caller.infer(images[:, :, :12, :12]), 400, "malformed-request")
        alone = logits_of(caller.infer(images[[5]]))
    small = v2.functional.resize(torch.from_numpy(images), [12, 12], antialias=True)  # torchvision's, by itself
    blue_first = 255 * small[:, [2, 1, 0]]
    mean, std = torch.tensor([103.9, 116.8, 123.7]), torch.tensor([57.4, 57.1, 58.4])
    expected = tiny()((blue_first - mean[:, None, None]) / std[:, None, None]).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_array_equal(alone.view(np.int32), logits[[5]].view(np.int32))


def test_options_win_over_the_file_and_the_file_over_the_source(tmp_path: Path) -> None:
    write_onnx(tiny(), tmp_path / "m.onnx")
    (tmp_path / "p.toml").write_text("size = 24\nresize = 12\nmean = [0.1, 0.2, 0.3]\nstd = [0.5, 0.5, 0.5]")
    given = {"model": str(tmp_path / "m.onnx"), "preprocessing": tmp_path / "p.toml"}
    told = load_hidden(Settings(**given)).preprocessing
    assert told is not None
    assert (told.size, told.resize, told.mean, told.std) == ((24, 24), (12, 12), (0.1, 0.2, 0.3), (0.5,) * 3)
    told = load_hidden(Settings(**given, image_size=30, mean=(0.4,) * 3)).preprocessing
    assert told is not None
    assert (told.size, told.resize, told.mean, told.std) == ((30, 30), (12, 12), (0.4,) * 3, (0.5,) * 3)


def test_what_a_source_says_is_taken_in_the_terms_of_the_file(tmp_path: Path) -> None:
    """A network's own normalisation is of red, green, blue in [0, 1]; in another range or order it is the same."""
    plain = load_classifier(Settings())
    (tmp_path / "p.toml").write_text("range = 255\nsize = 16\nresize = 8\ninterpolation = 'nearest'")
    declared = load_classifier(Settings(preprocessing=tmp_path / "p.toml"))
    images = torch.rand(3, 1, 8, 8)
    twice = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert declared.image_shape == (1, 16, 16)
    torch.testing.assert_close(declared.module(twice), plain.module(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ["eager", "compile", "onnxruntime"])
def test_every_engine_computes_it(engine: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("range = 255\nsize = [8, 16]")
    settings = Settings(preprocessing=tmp_path / "p.toml", engine=engine, engine_block=4)  # type: ignore[arg-type]
    model = load_classifier(settings)
    built = build_engine(model, settings)
    assert isinstance(built, BlockEngine)
    assert built.name == engine
    images = torch.rand(5, 1, 8, 16)
    torch.testing.assert_close(built(images), model.module(images), rtol=0, atol=1e-4)


def test_bicubic_stays_within_the_pixels(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("size = 6\nresize = 8\ninterpolation = 'bicubic'")
    first = load_classifier(Settings(preprocessing=tmp_path / "p.toml")).module[0]
    resized = first((torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float())
    assert (resized.min(), resized.max()) == (0, 1)


def test_mistakes_in_the_file(tmp_path: Path) -> None:
    write_onnx(tiny(), tmp_path / "m.onnx")
    path = tmp_path / "p.toml"
    for text, message in (
        ("size = 12\nsizes = 3", "sizes: .*it may say size, resize"),
        ("range = 100", "range"),
        ("std = [0.0]", "std"),
        ("layout = 'NHWC'", "layout"),
        ("size = ", "is not TOML"),
        ("mean = [0.5]", "--mean has 1 values and the images 3"),
        ("resize = 10", r"resize = \[12, 12\]"),
    ):
        path.write_text(text)
        with pytest.raises(ModelError, match=message):
            load_classifier(Settings(model=str(tmp_path / "m.onnx"), preprocessing=path))
    path.write_text("channels = 'bgr'")
    with pytest.raises(ModelError, match="order of 3 channels"):
        load_classifier(Settings(preprocessing=path))
    with pytest.raises(ModelError, match="cannot be read"):
        read_preprocessing(tmp_path / "none.toml")
    with pytest.raises(ModelError, match="--preprocessing is for classifiers"):
        load_hidden(Settings(task="reconstruction", preprocessing=path))
    assert read_preprocessing(None) == Preprocessing()
