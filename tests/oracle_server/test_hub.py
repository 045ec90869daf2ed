"""timm's models and the hub's: the real libraries, and a hub on a loopback port that serves models made on the spot."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_support import logits_of, running
from safetensors.torch import save_file
from sources_support import COMMIT, Hub, hub
from torch import nn

from oracle_server.loading import load_classifier, load_hidden
from oracle_server.settings import Settings
from shared.models.classifiers import Normalize
from shared.models.weight_files import ModelError

timm = pytest.importorskip("timm")
huggingface_hub = pytest.importorskip("huggingface_hub")
NAME = "test_resnet"
REPO, PICKLED, OTHER = "owner/made", "owner/pickled", "owner/other"
SIZE = 32
_PATHS = "{repo_id}/resolve/{revision}/{filename}"
HALF = Normalize((0.5,) * 3, (0.5,) * 3)  # what timm says of this architecture


def made(classes: int = 4, channels: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = timm.create_model(NAME, num_classes=classes, in_chans=channels)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return network.eval().requires_grad_(False)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a model of our own, one whose weights are a pickle, one that is not timm's, and timm's own weights."""
    save = timm.models.save_for_hf
    for folder, network in (("made", made()), ("default", made(1000))):
        (tmp_path / folder).mkdir()
        save(network, tmp_path / folder, safe_serialization=True)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((tmp_path / "made" / "config.json").read_bytes())
    torch.save(made().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    save_file(made().state_dict(), tmp_path / "other" / "model.safetensors")
    repositories = {
        REPO: tmp_path / "made",
        PICKLED: tmp_path / "pickled",
        OTHER: tmp_path / "other",
        "timm/test_resnet.r160_in1k": tmp_path / "default",
    }
    monkeypatch.setattr(logging.getLogger("timm.models._builder"), "disabled", True)
    constants = huggingface_hub.constants
    with hub(repositories) as served:
        # HF_ENDPOINT, which is read when the library is imported.
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{served.url}/{_PATHS}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield served


def test_a_model_of_the_hub_is_served(remote: Hub, tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((5, 3, SIZE, SIZE), dtype=np.float32)
    settings = Settings(
        model=f"hf-hub:{REPO}", image_size=SIZE, ledger=str(tmp_path / "ledger.db"), engine="eager", engine_block=4
    )
    with running(settings) as server:
        logits = logits_of(server.caller().infer(images))
    expected = made()(HALF(torch.from_numpy(images))).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    fetched = [line for line in remote.asked if line.startswith("GET") and "/resolve/" in line]
    assert [line.rpartition("/")[2] for line in fetched] == ["config.json", "model.safetensors"]
    assert "/resolve/main/" in fetched[0]
    assert f"/resolve/{COMMIT}/" in fetched[1]  # of the commit that the first file was of
    # What was fetched is kept; a commit is asked for once and never again.
    remote.asked.clear()
    hidden = load_hidden(Settings(model=f"hf-hub:{REPO}@{COMMIT}"))
    assert hidden.model.image_shape == (3, 160, 160)  # as its config.json says
    assert [path.name for path in hidden.files] == ["model.safetensors"]
    assert not [line for line in remote.asked if "/resolve/" in line]


def test_pickled_weights_are_not_even_fetched(remote: Hub) -> None:
    with pytest.raises(ModelError, match=r"has no model\.safetensors: .*pickles never"):
        load_classifier(Settings(model=f"hf-hub:{PICKLED}"))
    assert not [line for line in remote.asked if "pytorch_model" in line]


def test_what_is_not_there_is_said(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for model, message in (
        ("hf-hub:owner/nothing", "no repository 'owner/nothing'"),
        ("hf-hub:a/b/c/d", "OWNER/REPO"),
        (f"hf-hub:{OTHER}", "no model of timm's format"),
    ):
        with pytest.raises(ModelError, match=message):
            load_classifier(Settings(model=model))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"config\.json is not in the cache"):
        load_classifier(Settings(model=f"hf-hub:{REPO}"))


def test_timms_own_weights_come_from_the_hub(remote: Hub) -> None:
    found = load_classifier(Settings(model=f"timm:{NAME}", weights="DEFAULT", image_size=SIZE))
    images = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(found.module(images), made(1000)(HALF(images)), rtol=0, atol=1e-4)
    assert any(line.endswith("model.safetensors") for line in remote.asked)
    for option, value in (("classes", 7), ("channels", 1)):  # timm would make weights up for them
        with pytest.raises(ModelError, match=f"leave out --{option}"):
            load_classifier(Settings(model=f"timm:{NAME}", weights="DEFAULT", **{option: value}))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_architecture_of_timms_with_weights_of_a_file(suffix: str, tmp_path: Path) -> None:
    weights = tmp_path / f"w{suffix}"
    local = made(classes=6, channels=1)
    if suffix == ".pt":
        torch.save(local.state_dict(), weights)
    else:
        save_file(local.state_dict(), weights)
    settings = Settings(model=f"timm:{NAME}", weights=str(weights), image_size=SIZE, mean=(0.25,), std=(0.5,))
    found = load_classifier(settings)
    assert (found.image_shape, found.classes, found.bound) == ((1, SIZE, SIZE), 6, None)
    images = torch.rand(2, 1, SIZE, SIZE)
    torch.testing.assert_close(found.module(images), local((images - 0.25) / 0.5), rtol=0, atol=1e-4)


def test_mistakes_with_timm(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    for given, message in (
        ({"model": "timm:resnet1"}, "did you mean .*resnet1"),
        ({"model": f"timm:{NAME}.none", "weights": "DEFAULT"}, "no weights 'none'"),
        ({"model": f"timm:{NAME}"}, "--weights DEFAULT"),
        ({"model": f"timm:{NAME}", "weights": str(tmp_path / "w.safetensors")}, "do not fit"),
    ):
        with pytest.raises(ModelError, match=message):
            load_classifier(Settings(**given))


@pytest.mark.parametrize(
    ("model", "package", "extra"),
    [("timm:resnet18", "timm", "timm"), ("hf-hub:a/b", "huggingface_hub", "hub"), ("hf-hub:a/b", "timm", "hub")],
)
def test_a_missing_package_is_named_with_its_extra(
    model: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=rf"'{model}' needs .* '{package}'.*pip install 'zo-defense\[{extra}\]'"):
        load_classifier(Settings(model=model, weights="DEFAULT"))
