"""The stacks that benchmarks defend with, of random weights: they cost what trained ones cost."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.models import CLASSES, IMAGE_SHAPE
from defender_client.stack import Stack, StackSpec
from shared.models.autoencoder import AutoencoderSpec, paper_cifar, pyramid
from shared.models.denoisers import DenoiserSpec

SIGMA = 0.25


def latent_stack(latent: int, denoiser: str = "none") -> Stack:
    """A stack with an autoencoder (ZO-AE-DS): the paper's for d = 192, a pyramid for any other latent."""
    return _stack(paper_cifar() if latent == 192 else pyramid(IMAGE_SHAPE, latent), denoiser)


def pixel_stack(denoiser: str = "none") -> Stack:
    """A stack without one (ZO-DS)."""
    return _stack(None, denoiser)


def _stack(autoencoder: AutoencoderSpec | None, denoiser: str) -> Stack:
    """`denoiser`: none, or ARCHITECTURE:DEPTH:WIDTH, such as dncnn:17:64."""
    architecture, *size = denoiser.split(":")
    named = DenoiserSpec.model_validate(
        {"architecture": architecture, **dict(zip(("depth", "width"), map(int, size), strict=False))}
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        stack = Stack(
            StackSpec(image_shape=IMAGE_SHAPE, classes=CLASSES, sigma=SIGMA, denoiser=named, autoencoder=autoencoder)
        )
        if stack.autoencoder is not None:
            _keep_size(stack.autoencoder.decoder)
    return stack.eval()


def _keep_size(decoder: nn.Module) -> None:
    """Weights with which latents make images that differ, as after training: torch's own would decode all to grey."""
    with torch.no_grad():
        for layer in decoder.modules():
            if isinstance(layer, nn.ConvTranspose2d):
                # Each output pixel is a sum over the channels and 1 / stride^2 of the kernel.
                terms = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1] / layer.stride[0] ** 2
                layer.weight.normal_(0.0, (2.0 / terms) ** 0.5)
            elif isinstance(layer, nn.Linear):
                layer.weight.normal_(0.0, (2.0 / layer.in_features) ** 0.5)
