"""Denoisers: shapes, the residual structure, size, and that gradients reach every parameter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from shared.models.denoisers import DenoiserSpec, build_denoiser
from shared.models.dncnn import DnCNN
from shared.models.unet import UNet


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


SPECS = [
    DenoiserSpec(architecture="dncnn", depth=4, width=8),
    DenoiserSpec(architecture="unet"),
    DenoiserSpec(architecture="unet", depth=2, width=6),
]


def ids(spec: DenoiserSpec) -> str:
    return f"{spec.architecture}-{spec.depth}-{spec.width}"


def built(spec: DenoiserSpec, channels: int) -> nn.Module:
    denoiser = build_denoiser(spec, channels)
    assert denoiser is not None
    return denoiser


def last_convolution(denoiser: nn.Module) -> nn.Conv2d:
    return [m for m in denoiser.modules() if isinstance(m, nn.Conv2d)][-1]


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 1, 28, 28), (2, 3, 32, 32), (3, 3, 33, 45), (2, 2, 1, 3)], ids=str)
def test_an_image_comes_back_in_its_shape(spec: DenoiserSpec, shape: tuple[int, ...]) -> None:
    out = built(spec, shape[1])(torch.rand(shape))
    assert out.shape == shape
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (13, 21)])
def test_a_silent_network_leaves_the_image_as_it_is(spec: DenoiserSpec, height: int, width: int) -> None:
    denoiser = built(spec, 3)
    last = last_convolution(denoiser)
    nn.init.zeros_(last.weight)
    images = torch.rand(2, 3, height, width)
    assert torch.equal(denoiser(images), images)
    if last.bias is not None:
        nn.init.constant_(last.bias, 0.25)
        assert torch.equal(denoiser(images), images + 0.25)


def test_dncnn_subtracts_what_its_network_says() -> None:
    denoiser = DnCNN(1, depth=3, width=4).eval()
    images = torch.rand(2, 1, 9, 9)
    noise = denoiser.net(images).detach()
    assert float(noise.abs().max()) > 0
    assert torch.equal(denoiser(images).detach(), images - noise)


def test_an_untrained_unet_is_the_identity() -> None:
    images = torch.rand(2, 3, 17, 9)
    assert torch.equal(UNet(3)(images), images)


@pytest.mark.parametrize(("channels", "depth", "width"), [(3, 17, 64), (1, 17, 64), (3, 8, 32), (1, 2, 5)])
def test_dncnn_has_as_many_parameters_as_the_closed_form(channels: int, depth: int, width: int) -> None:
    first = 9 * channels * width + width
    middle = (depth - 2) * (9 * width * width + 2 * width)  # no bias; batch norm's scale and shift
    last = 9 * width * channels
    assert sum(p.numel() for p in DnCNN(channels, depth, width).parameters()) == first + middle + last


def test_dncnn_is_the_papers() -> None:
    denoiser = built(DenoiserSpec(architecture="dncnn"), 3)
    convolutions = [m for m in denoiser.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in denoiser.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (len(convolutions), len(norms)) == (17, 15)
    assert {norm.eps for norm in norms} == {1e-4}
    for convolution in convolutions[1:-1]:
        rows = convolution.weight.detach().flatten(1).double()  # [64, 576]
        torch.testing.assert_close(rows @ rows.T, torch.eye(64, dtype=torch.float64), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_gradients_reach_every_parameter_and_the_image(spec: DenoiserSpec) -> None:
    denoiser = built(spec, 3)
    nn.init.normal_(last_convolution(denoiser).weight)  # the U-Net's starts at zero and would hide the rest
    images = torch.rand(4, 3, 16, 16, requires_grad=True)
    denoiser(images).square().sum().backward()
    dead = [name for name, p in denoiser.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert dead == []
    assert images.grad is not None
    assert bool(images.grad.any())


def test_unet_learns_to_remove_noise() -> None:
    denoiser = UNet(1, depth=2, width=8)
    optimizer = torch.optim.Adam(denoiser.parameters(), 1e-2)
    clean = torch.rand(64, 1, 1, 1).expand(64, 1, 8, 8)
    for _ in range(40):
        noisy = clean + 0.25 * torch.randn(clean.shape)
        loss = (denoiser(noisy) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * 0.25**2


def test_an_image_does_not_depend_on_the_others_in_its_batch() -> None:
    denoiser = UNet(1)
    nn.init.normal_(denoiser.head.weight)
    images = torch.rand(4, 1, 16, 16)
    torch.testing.assert_close(denoiser(images)[:1], denoiser(images[:1]), atol=1e-4, rtol=1e-4)


def test_a_spec_holds_the_numbers_in_force_and_survives_a_round_trip() -> None:
    spec = DenoiserSpec(architecture="dncnn", width=32)
    assert (spec.depth, spec.width) == (17, 32)
    assert DenoiserSpec.model_validate_json(spec.model_dump_json()) == spec
    assert DenoiserSpec(architecture="unet").model_dump() == {"architecture": "unet", "depth": 3, "width": 16}
    assert build_denoiser(DenoiserSpec(architecture="none"), 3) is None


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"architecture": "resnet"},
        {"architecture": "dncnn", "depth": 1},
        {"architecture": "unet", "depth": -1},
        {"architecture": "none", "width": 3},
        {"architecture": "unet", "levels": 3},
    ],
    ids=str,
)
def test_a_spec_that_describes_nothing_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DenoiserSpec.model_validate(values)
