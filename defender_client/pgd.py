"""PGD in l2: gradient ascent on any differentiable loss of images, projected into a ball around each and into [0, 1].

    x_0     = P(x + r),  r uniform in the ball of radius epsilon
    x_{t+1} = P(x_t + a grad l(x_t) / |grad l(x_t)|_2),  a = 2 epsilon / steps by default

After Madry et al., ICLR 2018, with the normalised gradient of l2 (Rony et al., CVPR 2019). It knows neither classifiers
nor oracles: a loss may be a cross-entropy or a reconstruction's error, and may draw noise of its own (see `draws`).
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor

from defender_client.data import gaussian

Loss = Callable[[Tensor], Tensor]
"""Images [b, c, h, w] in [0, 1] -> losses [b], differentiable; a loss may depend on its own image only."""


def pgd(
    loss: Loss, images: Tensor, epsilon: float, steps: int, generator: torch.Generator, step: float | None = None
) -> Tensor:
    """Images near `images` with a large loss.

    An image whose gradient is zero stays where it is in that step. The default step is the paper's; its steps add up to
    2 epsilon, which from a start at right angles to the gradient of a linear loss leads to tanh 2 = 96 % of the most.

    Args:
        loss: what to make large.
        images: float [b, c, h, w] in [0, 1].
        epsilon: radius of the ball, in l2 over pixels in [0, 1].
        steps: gradients to take.
        generator: draws the random start.
        step: length a of a step; None for 2 epsilon / steps (Zhang et al., ICLR 2022).

    Returns:
        Images [b, c, h, w] in [0, 1], at most `epsilon` (up to float rounding) from `images`: those of the last step.

    Raises:
        ValueError: an argument out of range, losses that are not [b], or gradients that are not finite.
    """
    if not (isfinite(epsilon) and epsilon > 0) or steps < 1:
        raise ValueError(f"epsilon must be positive and there must be a step, not {epsilon} and {steps}")
    step = 2 * epsilon / steps if step is None else step
    if not (isfinite(step) and step > 0):
        raise ValueError(f"a step must be positive, not {step}")
    images = images.detach()
    moved = project(images + uniform_in_ball(images, epsilon, generator), images, epsilon)
    for _ in range(steps):
        moved = project(moved + step * _directions(loss, moved), images, epsilon)
    return moved


def project(moved: Tensor, images: Tensor, epsilon: float) -> Tensor:
    """`moved` [b, c, h, w] into the l2 ball of radius epsilon around `images` [b, c, h, w], and then into [0, 1].

    The second projection keeps the first: where `images` are in [0, 1], it only brings pixels nearer to them.
    """
    added = moved - images
    norms = added.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    inside: Tensor = images + added * (epsilon / norms.clamp_min(epsilon))
    return inside.clamp(0.0, 1.0)


def uniform_in_ball(images: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """Perturbations shaped as `images` [b, c, h, w], each uniform in the l2 ball of radius epsilon."""
    # r = epsilon u^(1/d) g / |g|, g ~ N(0, I_d), u ~ U(0, 1): a uniform direction, and P(|r| < t) = (t / epsilon)^d
    directions = torch.randn(images.shape, generator=generator).to(images).flatten(1)
    radii = epsilon * torch.rand(len(images), 1, generator=generator).to(images).pow(1 / directions.shape[1])
    added: Tensor = radii * directions / directions.norm(dim=1, keepdim=True)
    return added.view_as(images)


def draws(images: Tensor, sigma: float, copies: int, generator: torch.Generator) -> Tensor:
    """Noisy copies [copies, b, c, h, w], x + sigma N(0, I), of images [b, c, h, w]; for `copies` = 0 the images as they
    are, [1, b, c, h, w].

    A loss that averages over fresh draws has the expectation over noise as its gradient's mean (EOT: Athalye et al.,
    ICML 2018).
    """
    return gaussian(images.expand(copies, *images.shape), sigma, generator) if copies else images[None]


def _directions(loss: Loss, images: Tensor) -> Tensor:
    """grad l / |grad l|_2 of each image, [b, c, h, w]; zero where the gradient is."""
    asked = images.clone().requires_grad_()
    losses = loss(asked)
    if losses.shape != images.shape[:1]:
        raise ValueError(f"losses must be [{len(images)}], not {list(losses.shape)}")
    (gradients,) = torch.autograd.grad(losses.sum(), asked)
    flat = gradients.flatten(1)
    if not bool(torch.isfinite(flat).all()):
        raise ValueError("the loss has gradients that are not finite: there is no direction to go")
    # Scaled first: the squares of a confident classifier's gradients are below the smallest float32.
    largest = flat.abs().amax(dim=1, keepdim=True)
    scaled = flat / largest.where(largest > 0, 1.0)
    directions: Tensor = scaled / scaled.norm(dim=1, keepdim=True).clamp_min(1.0)  # at least 1, but for a zero
    return directions.view_as(gradients)
