from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from oracle_support import logits_of, running
from safetensors.torch import save_file

from oracle_server.cpus import usable_cpus
from oracle_server.loading import load_classifier
from oracle_server.settings import Settings
from shared.datasets import load
from shared.models.classifiers import CifarResNet, Normalize, SmallCNN
from shared.models.weight_files import ModelError, WeightsInfo, read_weights, write_weights


def test_the_shipped_digits_classifier_is_a_good_one() -> None:
    classifier = load_classifier(Settings())
    test = load("digits", None, "test")
    with torch.inference_mode():
        right = (classifier.module(test.floats(slice(None))).argmax(1) == test.labels).float().mean()
    assert (classifier.image_shape, classifier.classes) == ((1, 8, 8), 10)
    assert right > 0.98
    assert not classifier.module.training


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_torchvision_model_is_served_as_it_is(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    local = torchvision.models.squeezenet1_1(num_classes=7).eval()
    weights = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": x for name, x in local.state_dict().items()}}, weights)
    else:
        save_file(local.state_dict(), weights)
    settings = Settings(model="squeezenet1_1", weights=str(weights), image_size=48, ledger=str(tmp_path / "ledger.db"))
    images = np.random.default_rng(0).random((2, 3, 48, 48), dtype=np.float32)
    with running(settings) as server:
        logits = logits_of(server.caller().infer(images))
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # torchvision's own, taken without being told
    with torch.inference_mode():
        expected = local(normalize(torch.from_numpy(images))).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_cifar_resnet_needs_only_its_weights(tmp_path: Path) -> None:
    save_file(CifarResNet(20, classes=5).state_dict(), tmp_path / "w.safetensors")
    classifier = load_classifier(Settings(model="cifar-resnet20", weights=str(tmp_path / "w.safetensors")))
    assert (classifier.image_shape, classifier.classes) == ((3, 32, 32), 5)


def test_what_the_file_says_wins_over_defaults_and_options_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    info = WeightsInfo("small-cnn", channels=1, image_size=12, classes=4, mean=(0.1,), std=(0.2,), command="x")
    write_weights(path, SmallCNN(1, 4).state_dict(), info)
    assert read_weights(path)[1] == info
    classifier = load_classifier(Settings(model="small-cnn", weights=str(path)))
    assert classifier.image_shape == (1, 12, 12)
    assert classifier.module[0].mean.item() == pytest.approx(0.1)
    classifier = load_classifier(Settings(model="small-cnn", weights=str(path), image_size=16, mean=(0.7,)))
    assert classifier.image_shape == (1, 16, 16)
    assert classifier.module[0].mean.item() == pytest.approx(0.7)
    assert classifier.module[0].std.item() == pytest.approx(0.2)


def test_every_mistake_is_told_apart(tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    save_file(SmallCNN(1, 4).state_dict(), small)
    (tmp_path / "text.pth").write_text("no tensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    torch.save({"a": 1}, tmp_path / "odd.pt")
    for options, message in (
        ({"model": "resnet19"}, "resnet18"),
        ({"model": "resnet18"}, "--weights DEFAULT"),
        ({"model": "cifar-resnet20"}, "--weights FILE"),
        ({"model": "resnet18", "weights": "IMAGENET"}, "IMAGENET1K_V1"),
        ({"model": "small-cnn", "weights": "none.safetensors"}, "no weights file"),
        ({"model": "small-cnn", "weights": str(tmp_path / "text.pth")}, "cannot be read"),
        ({"model": "small-cnn", "weights": str(tmp_path / "text.safetensors")}, "cannot be read"),
        ({"model": "small-cnn", "weights": str(tmp_path / "odd.pt")}, "no state dict"),
        ({"model": "small-cnn", "weights": str(small)}, "--image-size"),
        ({"model": "small-cnn", "weights": str(small), "image_size": 8, "mean": (0.1, 0.2)}, "--mean"),
        ({"model": "small-cnn", "weights": str(small), "image_size": 8, "classes": 5}, "linear.weight is"),
        ({"model": "cifar-resnet20", "weights": str(small)}, "do not fit"),
    ):
        with pytest.raises(ModelError, match=message):
            load_classifier(Settings(**options))


def test_an_image_too_small_for_the_network_is_found_before_serving(tmp_path: Path) -> None:
    save_file(torchvision.models.squeezenet1_1(num_classes=7).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="--image-size"):
        load_classifier(Settings(model="squeezenet1_1", weights=str(tmp_path / "w.safetensors"), image_size=8))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({}, None),
    ],
)
def test_a_cpu_quota_counts(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert usable_cpus(tmp_path) == (expected or usable_cpus(tmp_path / "none"))


@pytest.mark.parametrize(("said", "expected"), [("1", 1), (" 1 ,4", 1), ("100000", None), ("many", None), ("0", 1)])
def test_cores_set_aside_for_others_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, expected: int | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    unsaid = usable_cpus(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert usable_cpus(tmp_path) == (expected or unsaid)
