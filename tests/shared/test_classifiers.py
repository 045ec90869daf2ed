"""Classifiers as published: sizes of He et al. 2016, names of the state dict, what the layers compute."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from shared.models.classifiers import CIFAR_DEPTHS, SMALL_CNNS, CifarResNet, Normalize, SmallCNN, build_own


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Millions of parameters, He et al. 2016, table 6.
PUBLISHED = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}


@pytest.mark.parametrize("depth", PUBLISHED)
def test_resnet_sizes(depth: int) -> None:
    n = (depth - 2) // 6
    # Convolutions without bias, two numbers a channel per batch norm, a linear layer with bias. A stage of c channels
    # has 2n convolutions, the first of them from the stage before; shortcuts have none.
    stem = 3 * 9 * 16 + 2 * 16
    stages = sum(
        9 * before * c + (2 * n - 1) * 9 * c * c + 2 * n * 2 * c for before, c in ((16, 16), (16, 32), (32, 64))
    )
    exact = stem + stages + 64 * 10 + 10
    with torch.device("meta"):
        model = CifarResNet(depth)
    assert parameters(model) == exact == 97216 * n - 21926
    assert round(exact / 1e6, 1 if depth == 110 else 2) == PUBLISHED[depth]


def test_resnet_names() -> None:
    def norm(name: str) -> list[str]:
        return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    expected = ["conv1.weight", *norm("bn1")]
    for stage, block, i in itertools.product((1, 2, 3), range(3), (1, 2)):
        expected += [f"layer{stage}.{block}.conv{i}.weight", *norm(f"layer{stage}.{block}.bn{i}")]
    assert list(CifarResNet(20).state_dict()) == [*expected, "linear.weight", "linear.bias"]


def test_the_shortcut_is_option_a() -> None:
    block = CifarResNet(20).layer2[0].eval()
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"conv1", "bn1", "conv2", "bn2"}
    # With the residual branch silenced only the shortcut is left: every second pixel, zeros around the channels.
    torch.nn.init.zeros_(block.bn2.weight)
    torch.nn.init.zeros_(block.bn2.bias)
    x = torch.rand(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    out = block(x)
    assert out.shape == (2, 32, 4, 4)
    torch.testing.assert_close(out[:, 8:24], x[:, :, ::2, ::2], rtol=0, atol=0)
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 19, 21])
def test_depths_that_do_not_exist(depth: int) -> None:
    with pytest.raises(ValueError, match="6n \\+ 2"):
        CifarResNet(depth)


@pytest.mark.parametrize(("channels", "classes"), [(1, 10), (3, 100)])
def test_resnet_answers(channels: int, classes: int) -> None:
    assert CifarResNet(8, channels, classes).eval()(torch.rand(2, channels, 32, 32)).shape == (2, classes)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (32, 32), (5, 9), (1, 1), (96, 96)])
@pytest.mark.parametrize(("channels", "classes"), [(1, 10), (3, 7)])
def test_small_cnn_takes_any_size(height: int, width: int, channels: int, classes: int) -> None:
    model = SmallCNN(channels, classes).eval()
    logits = model(torch.rand(2, channels, height, width))
    assert logits.shape == (2, classes)
    assert logits.isfinite().all()
    w = 32
    convolutions = 9 * (channels * w + w * 2 * w + 2 * w * 2 * w)
    assert parameters(model) == convolutions + 2 * (w + 2 * w + 2 * w) + 8 * w * classes + classes


@pytest.mark.parametrize("model", [CifarResNet(8), SmallCNN(3)], ids=["resnet", "small"])
def test_rows_do_not_influence_each_other(model: torch.nn.Module) -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([model.eval()(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-5)


def test_normalize_is_numpy_s() -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    images = np.random.default_rng(0).random((2, 3, 5, 4)).astype(np.float32)
    expected = np.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], axis=1)
    np.testing.assert_allclose(Normalize(mean, std)(torch.from_numpy(images)).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_normalize_is_not_saved_but_moves() -> None:
    model = Normalize([0.5], [0.25])
    assert model.state_dict() == {}
    assert list(model.parameters()) == []
    assert {b.dtype for b in model.double().buffers()} == {torch.float64}
    # In front of a classifier it changes no name of a weight but by its place.
    inner = SmallCNN()
    keys = torch.nn.Sequential(model, inner).state_dict()
    assert list(keys) == [f"1.{name}" for name in inner.state_dict()]


@pytest.mark.parametrize("name", [*CIFAR_DEPTHS, *SMALL_CNNS])
def test_by_name(name: str) -> None:
    with torch.device("meta"):
        model = build_own(name, 1, 4)
    if name in CIFAR_DEPTHS:
        assert isinstance(model, CifarResNet)
        convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
        assert len(convolutions) + 1 == CIFAR_DEPTHS[name] == int(name.removeprefix("cifar-resnet"))
        assert (model.conv1.in_channels, model.linear.out_features) == (1, 4)
    else:
        assert isinstance(model, SmallCNN)
        assert (model.features[0].in_channels, model.linear.out_features) == (1, 4)


def test_other_names_are_not_ours() -> None:
    assert build_own("resnet18", 3, 10) is None


def test_resnet_is_the_published_function() -> None:
    # The forward pass once more, written from the paper's figure and the state dict alone.
    model = CifarResNet(14).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2, generator=generator)
            elif "bn" in name and tensor.is_floating_point():
                tensor.uniform_(-0.5, 1, generator=generator)
    s = model.state_dict()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, s[f"{name}.weight"], s[f"{name}.bias"], training=False)

    images = torch.rand(2, 3, 32, 32, generator=generator)
    x = F.relu(norm(F.conv2d(images, s["conv1.weight"], padding=1), "bn1"))
    for stage, block in itertools.product((1, 2, 3), (0, 1)):
        name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
        y = F.relu(norm(F.conv2d(x, s[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
        y = norm(F.conv2d(y, s[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        shortcut = torch.zeros_like(y)
        spare = (y.shape[1] - x.shape[1]) // 2
        shortcut[:, spare : spare + x.shape[1]] = x[:, :, ::stride, ::stride]
        x = F.relu(y + shortcut)
    expected = x.mean(dim=(2, 3)) @ s["linear.weight"].T + s["linear.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
