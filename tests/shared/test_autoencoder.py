"""The paper's autoencoder layer by layer; the pyramid for any size; both rebuilt from their JSON alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from shared.models.autoencoder import (
    Autoencoder,
    AutoencoderSpec,
    Shape,
    fit_principal,
    paper,
    paper_cifar,
    paper_mnist,
    paper_stl,
    principal,
    pyramid,
)


def walk(network: nn.Sequential, x: Tensor, kind: type[nn.Module] = nn.Module) -> list[tuple[int, ...]]:
    """Shapes (without the batch) after each module of `kind`."""
    shapes = []
    for module in network:
        x = module(x)
        if isinstance(module, kind):
            shapes.append(tuple(x.shape[1:]))
    return shapes


def seeded(spec: AutoencoderSpec, seed: int = 0) -> Autoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Autoencoder(spec)


def test_the_paper_s_shapes() -> None:
    model = Autoencoder(paper_cifar())
    down = [(24, 8, 8), (48, 4, 4), (96, 2, 2), (192, 1, 1)]
    up = [(96, 2, 2), (48, 4, 4), (24, 8, 8), (3, 32, 32)]
    assert walk(model.encoder, torch.rand(2, 3, 32, 32), nn.Conv2d) == down
    assert walk(model.encoder, torch.rand(2, 3, 32, 32))[-1] == (192,)
    assert walk(model.decoder, torch.rand(2, 192))[0] == (192, 1, 1)
    assert walk(model.decoder, torch.rand(2, 192), nn.ConvTranspose2d) == up
    assert (model.spec.latent, model.spec.image_shape) == (192, (3, 32, 32))


def test_the_paper_s_other_data_sets() -> None:
    stl, mnist = Autoencoder(paper_stl()), Autoencoder(paper_mnist())
    assert walk(stl.encoder, torch.rand(1, 3, 96, 96), nn.Conv2d) == [
        (18, 32, 32), (72, 8, 8), (144, 4, 4), (288, 2, 2), (576, 1, 1)
    ]  # fmt: skip
    assert walk(stl.decoder, torch.rand(1, 576))[-1] == (3, 96, 96)
    assert walk(mnist.encoder, torch.rand(1, 1, 28, 28), nn.Conv2d) == [(3, 14, 14), (12, 4, 4)]
    assert walk(mnist.decoder, torch.rand(1, 192))[-1] == (1, 28, 28)
    assert (stl.spec.latent, mnist.spec.latent) == (576, 192)


def test_the_paper_has_one_for_a_shape_and_its_latent() -> None:
    assert paper((3, 32, 32), 192) == paper_cifar()
    assert paper((3, 96, 96), 576) == paper_stl()
    assert paper((1, 28, 28), 192) == paper_mnist()
    assert paper((3, 32, 32), 64) is paper((1, 8, 8), 192) is None


def test_the_paper_s_layers() -> None:
    model = Autoencoder(paper_cifar())
    assert [type(m).__name__ for m in model.encoder] == ["Conv2d", "ReLU"] * 4 + ["Flatten"]
    assert [type(m).__name__ for m in model.decoder] == [
        "Unflatten", "ConvTranspose2d", "ReLU", "ConvTranspose2d", "ReLU", "ConvTranspose2d", "ReLU",
        "ConvTranspose2d", "Sigmoid",
    ]  # fmt: skip
    channels, kernels = (3, 24, 48, 96, 192), (4, 3, 4, 2)
    weights = sum(k * k * a * b for k, a, b in zip(kernels, channels, channels[1:], strict=False))
    assert sum(p.numel() for p in model.encoder.parameters()) == weights + sum(channels[1:])
    assert sum(p.numel() for p in model.decoder.parameters()) == weights + sum(channels[:-1])


SHAPES: list[Shape] = [
    (1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 96, 96), (1, 1, 1), (1, 2, 2), (2, 3, 3), (1, 4, 4), (1, 5, 5),
    (3, 7, 11), (3, 17, 16), (1, 1, 9), (3, 33, 65), (1, 31, 8),
]  # fmt: skip
SPECS = {
    "paper": paper_cifar(),
    "paper-stl": paper_stl(),
    "paper-mnist": paper_mnist(),
    "principal": principal((2, 3, 5), 7),
    **{"x".join(map(str, s)): pyramid(s, latent, 8) for s, latent in zip(SHAPES, range(3, 99), strict=False)},
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@every_spec
def test_latents_and_images_are_in_their_ranges(spec: AutoencoderSpec) -> None:
    model = seeded(spec).eval()
    images = torch.rand(3, *spec.image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = model.encode(images)
        decoded = model.decode(latents)
        # Probes leave the encoder's range: any latent must decode into an image.
        probed = model.decode(100 * torch.randn(3, spec.latent, generator=torch.Generator().manual_seed(1)))
    assert latents.shape == (3, spec.latent)
    assert latents.min() >= 0 or spec.fitted
    for out in (decoded, probed):
        assert out.shape == images.shape
        assert 0 <= out.min() <= out.max() <= 1
    torch.testing.assert_close(model(images), decoded)


@every_spec
def test_json_builds_the_same_network(spec: AutoencoderSpec) -> None:
    text = spec.model_dump_json()
    again = AutoencoderSpec.model_validate_json(text)
    assert again == spec
    first, second = seeded(spec, 0), seeded(again, 1)
    second.load_state_dict(first.state_dict(), strict=True)
    images = torch.rand(2, *spec.image_shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first(images), second(images), rtol=0, atol=0)
    assert repr(first) == repr(second)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_pyramid_s_steps(shape: Shape) -> None:
    width = 16
    model = Autoencoder(pyramid(shape, 5, width))
    down = walk(model.encoder, torch.rand(1, *shape), nn.Conv2d)
    channels, height, size = width, -(-shape[1] // 2), -(-shape[2] // 2)
    expected = [(channels, height, size)]
    while max(height, size) > 4:
        channels, height, size = min(2 * channels, 128), -(-height // 2), -(-size // 2)
        expected.append((channels, height, size))
    assert down == expected
    assert max(down[-1][1:]) <= 4
    # The decoder passes through the same sizes on its way back.
    assert walk(model.decoder, torch.rand(1, 5), nn.ConvTranspose2d) == [*down[-2::-1], shape]


def test_the_pyramid_can_learn() -> None:
    model = seeded(pyramid((1, 6, 7), 16, 8))
    images = torch.rand(4, 1, 6, 7, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    losses = []
    for _ in range(20):
        loss = (model(images) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    "change",
    [
        {"latent": 0},
        {"image_shape": [3, 32]},
        {"image_shape": [0, 32, 32]},
        {"extra": 1},
        {"encoder": [{"kind": "exec"}]},
    ],
)
def test_specs_that_make_no_sense(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AutoencoderSpec.model_validate({**paper_cifar().model_dump(), **change})


@pytest.mark.parametrize("count", [200, 40], ids=["more images than pixels", "fewer"])
def test_principal_components_lose_what_numpy_s_singular_values_say(count: int) -> None:
    generator = torch.Generator().manual_seed(3)
    # Within [0.2, 0.8], so that nothing is clamped.
    mixed = torch.randn(count, 70, generator=generator) @ torch.randn(70, 96, generator=generator)
    images = (0.5 + 0.3 * mixed / mixed.abs().max()).view(count, 2, 6, 8)
    model = Autoencoder(principal((2, 6, 8), 9))
    fit_principal(model, images)
    rows = images.flatten(1).double().numpy()
    centred = rows - rows.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False)
    with torch.no_grad():
        lost = (model(images) - images).double().square().sum()
        assert float(lost) == pytest.approx(float((values[9:] ** 2).sum()), rel=1e-3)
        latents = model.encode(images)
    # Uncorrelated coordinates, the largest first, of the singular values' length.
    products = (latents.T @ latents).double()
    torch.testing.assert_close(products, torch.diag(torch.from_numpy(values[:9] ** 2)), rtol=1e-3, atol=1e-3)
    basis = model.decoder[0].weight  # type: ignore[union-attr]
    torch.testing.assert_close(basis.T @ basis, torch.eye(9), atol=1e-5, rtol=0)


def test_principal_components_need_images() -> None:
    model = Autoencoder(principal((1, 4, 4), 9))
    with pytest.raises(ValueError, match="more images than 9"):
        fit_principal(model, torch.rand(9, 1, 4, 4))
