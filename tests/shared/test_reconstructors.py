"""Reconstructors: any size in, the same out, and what the layers compute."""

from __future__ import annotations

import pytest
import torch
from reconstructor_support import alive
from torch.nn import functional as F

from shared.models.reconstructors import RECONSTRUCTORS, SmallReconstructor, build_reconstructor
from shared.models.weight_files import ModelError


@pytest.mark.parametrize(("height", "width"), [(28, 28), (32, 32), (8, 8), (5, 9), (1, 1), (7, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_it_takes_any_size(height: int, width: int, channels: int) -> None:
    images = torch.rand(2, channels, height, width)
    made = SmallReconstructor(channels).eval()(images)
    assert made.shape == images.shape
    assert ((made > 0) & (made < 1)).all()


def test_rows_do_not_influence_each_other() -> None:
    model, images = alive(), torch.rand(4, 1, 9, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-6)


def test_it_is_the_function_that_its_description_says() -> None:
    """The forward pass once more, from the state dict alone."""
    model = alive(2)
    s = model.state_dict()

    def convolution(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        y = F.conv2d(x, s[f"{name}.0.weight"], stride=stride, padding=1)
        mean, var = s[f"{name}.1.running_mean"], s[f"{name}.1.running_var"]
        return F.relu(F.batch_norm(y, mean, var, s[f"{name}.1.weight"], s[f"{name}.1.bias"], training=False))

    def up(x: torch.Tensor, name: str, like: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("nchw,oc->nohw", x, s[f"{name}.weight"][:, :, 0, 0]) + s[f"{name}.bias"][:, None, None]
        return y.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : like.shape[2], : like.shape[3]]

    images = torch.rand(3, 2, 7, 10, generator=torch.Generator().manual_seed(1))
    full = convolution(images, "enter")
    half = convolution(convolution(full, "down.0.0", 2), "down.0.1")
    quarter = convolution(convolution(half, "down.1.0", 2), "down.1.1")
    half = convolution(half + up(quarter, "up.1", half), "join.1")
    full = convolution(full + up(half, "up.0", full), "join.0")
    expected = torch.sigmoid(F.conv2d(full, s["leave.weight"], s["leave.bias"], padding=1))
    with torch.no_grad():
        made = model(images)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-6)
    assert made.std() > 0.05  # it is not a constant


def test_by_name() -> None:
    (name,) = RECONSTRUCTORS
    model = build_reconstructor(name, 3)
    assert isinstance(model, SmallReconstructor)
    assert model.leave.out_channels == 3
    with pytest.raises(ModelError, match="no reconstructor is called 'small-cnn': there is small-reconstructor"):
        build_reconstructor("small-cnn", 3)
