"""RMSE and SSIM where they are known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from defender_client.image_metrics import rmse, ssim

C1, C2 = 0.01**2, 0.03**2


def flat(value: float, count: int = 2, channels: int = 1, side: int = 9) -> torch.Tensor:
    return torch.full((count, channels, side, side), value)


def test_rmse_is_the_distance_over_the_root_of_the_pixels() -> None:
    images = flat(0.25, 3)
    images[1, 0, 0, 0] += 0.9
    images[2] += 0.5
    assert rmse(images, flat(0.25, 3)).tolist() == pytest.approx([0.0, 0.9 / 9, 0.5], abs=1e-7)


def test_rmse_of_colours_is_over_all_of_them() -> None:
    images = flat(0.0, 1, 3)
    images[0, 1] = 0.6
    assert rmse(images, flat(0.0, 1, 3)).tolist() == pytest.approx([0.6 / 3**0.5], abs=1e-7)


def test_an_image_is_like_itself() -> None:
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.7), (0.0, 1.0), (0.5, 0.5)])
def test_ssim_of_flat_images_is_that_of_their_means(a: float, b: float) -> None:
    # Without variance, SSIM = (2 a b + C1) / (a^2 + b^2 + C1): Wang et al. 2004, eq. (6).
    expected = (2 * a * b + C1) / (a * a + b * b + C1)
    assert ssim(flat(a), flat(b)).tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_ssim_of_one_window_is_the_formula() -> None:
    x, y = torch.rand(2, 1, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    a, b = x.double().numpy().ravel(), y.double().numpy().ravel()
    (va, cov), (_, vb) = np.cov(a, b)
    expected = (2 * a.mean() * b.mean() + C1) * (2 * cov + C2)
    expected /= (a.mean() ** 2 + b.mean() ** 2 + C1) * (va + vb + C2)  # Wang et al. 2004, eq. (13)
    assert ssim(x, y).item() == pytest.approx(expected, rel=1e-9)


def test_ssim_of_colours_is_the_mean_over_them() -> None:
    images, others = torch.rand(2, 2, 3, 11, 10, generator=torch.Generator().manual_seed(0))
    each = torch.stack([ssim(images[:, c : c + 1], others[:, c : c + 1]) for c in range(3)])
    torch.testing.assert_close(ssim(images, others), each.mean(dim=0))


def test_what_cannot_be_compared_is_told() -> None:
    for measure in (rmse, ssim):
        with pytest.raises(ValueError, match=r"must both be \[b, c, h, w\]"):
            measure(flat(0.0), flat(0.0, 1))
        with pytest.raises(ValueError, match=r"must both be \[b, c, h, w\]"):
            measure(flat(0.0)[0], flat(0.0)[0])
    with pytest.raises(ValueError, match="7 x 7"):
        ssim(flat(0.0, side=6), flat(0.0, side=6))
