"""The autoencoder: an encoder that ends in a ReLU and a decoder that ends in a sigmoid; or principal components.

The decoder is frozen after pre-training and merged into the black box, f'(z) = f(Dec(z)) (Zhang et al., ICLR 2022,
section 4), so that zeroth-order estimation searches the latent, of dimension d, and not the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from shared.models.layers import Activation, Conv, ConvTranspose, Flatten, Layer, Linear, Unflatten, build

RELU = Activation(kind="relu")
SIGMOID = Activation(kind="sigmoid")
CLAMP = Activation(kind="clamp")

Shape = tuple[int, int, int]


class AutoencoderSpec(BaseModel):
    """An autoencoder as data: images [b, *image_shape] <-> latents [b, latent]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    latent: PositiveInt
    encoder: tuple[Layer, ...]
    decoder: tuple[Layer, ...]
    fitted: bool = False
    """Whether its weights are computed from images, and never trained (`principal`)."""


class Autoencoder(nn.Module):
    """`encode`: images [b, c, h, w] in [0, 1] -> latents [b, d], >= 0 but for principal components; `decode`: back,
    images in [0, 1]."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = build(spec.encoder)
        self.decoder = build(spec.decoder)

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))


def paper_cifar() -> AutoencoderSpec:
    """The paper's autoencoder for CIFAR-10, [3, 32, 32] to 192 (Zhang et al., ICLR 2022, appendix; public code)."""
    # 32 -> 8 -> 4 -> 2 -> 1
    steps = ((3, 24, 4, 4, 0), (24, 48, 3, 3, 2), (48, 96, 4, 2, 1), (96, 192, 2, 2, 0))
    return _mirrored((3, 32, 32), steps, (192, 1, 1))


def paper_stl() -> AutoencoderSpec:
    """The paper's autoencoder for STL-10, [3, 96, 96] to 576 (public code)."""
    # 96 -> 32 -> 8 -> 4 -> 2 -> 1
    steps = ((3, 18, 5, 3, 1), (18, 72, 4, 4, 0), (72, 144, 3, 3, 2), (144, 288, 4, 2, 1), (288, 576, 2, 2, 0))
    return _mirrored((3, 96, 96), steps, (576, 1, 1))


def paper_mnist() -> AutoencoderSpec:
    """The paper's autoencoder for MNIST reconstruction, [1, 28, 28] to 192 (public code)."""
    # 28 -> 14 -> 4
    return _mirrored((1, 28, 28), ((1, 3, 4, 2, 1), (3, 12, 5, 3, 0)), (12, 4, 4))


def paper(image_shape: Shape, latent: int) -> AutoencoderSpec | None:
    """The paper's autoencoder for images of this shape and a latent of this dimension; None where it has none."""
    known = (paper_cifar(), paper_stl(), paper_mnist())
    return next((spec for spec in known if (spec.image_shape, spec.latent) == (image_shape, latent)), None)


def _mirrored(image_shape: Shape, steps: Sequence[Sequence[int]], features: Shape) -> AutoencoderSpec:
    """Convolutions (in, out, kernel, stride, padding), each with a ReLU, down to `features`; the decoder mirrors them
    with transposed convolutions and ends in a sigmoid."""
    encoder: list[Layer] = []
    for channels_in, channels_out, kernel, stride, padding in steps:
        encoder += [
            Conv(channels_in=channels_in, channels_out=channels_out, kernel=kernel, stride=stride, padding=padding),
            RELU,
        ]
    decoder: list[Layer] = [Unflatten(shape=features)]
    for channels_in, channels_out, kernel, stride, padding in reversed(steps):
        decoder += [
            ConvTranspose(
                channels_in=channels_out, channels_out=channels_in, kernel=kernel, stride=stride, padding=padding
            ),
            RELU,
        ]
    decoder[-1] = SIGMOID
    return AutoencoderSpec(
        image_shape=image_shape, latent=math.prod(features), encoder=(*encoder, Flatten()), decoder=tuple(decoder)
    )


def pyramid(image_shape: Shape, latent: int, width: int = 32) -> AutoencoderSpec:
    """An autoencoder for any image size: strided convolutions down to at most 4 x 4, then a linear layer.

    Args:
        image_shape: (c, h, w).
        latent: dimension d of the latent.
        width: channels after the first convolution; doubled at each further one, up to 128.
    """
    channels, height, size = image_shape[0], image_shape[1], image_shape[2]
    encoder: list[Layer] = []
    mirror: list[Layer] = []
    out = width
    while not encoder or max(height, size) > 4:
        encoder += [Conv(channels_in=channels, channels_out=out, kernel=3, stride=2, padding=1), RELU]
        # Kernel 3, stride 2, padding 1 takes n to ceil(n / 2); its mirror gives 2m - 1 plus output_padding.
        halves = (height + 1) // 2, (size + 1) // 2
        extra = (height - (2 * halves[0] - 1), size - (2 * halves[1] - 1))
        mirror[:0] = [
            ConvTranspose(channels_in=out, channels_out=channels, kernel=3, stride=2, padding=1, output_padding=extra),
            RELU,
        ]
        channels, (height, size), out = out, halves, min(2 * out, 128)
    features = channels * height * size
    mirror[-1] = SIGMOID
    return AutoencoderSpec(
        image_shape=image_shape,
        latent=latent,
        encoder=(*encoder, Flatten(), Linear(features_in=features, features_out=latent), RELU),
        decoder=(
            Linear(features_in=latent, features_out=features),
            RELU,
            Unflatten(shape=(channels, height, size)),
            *mirror,
        ),
    )


def principal(image_shape: Shape, latent: int) -> AutoencoderSpec:
    """Principal components: the linear autoencoder of the least squared error (Eckart and Young, Psychometrika 1936).

    Args:
        image_shape: (c, h, w).
        latent: dimension d of the latent, at most c * h * w.
    """
    pixels = math.prod(image_shape)
    return AutoencoderSpec(
        image_shape=image_shape,
        latent=latent,
        encoder=(Flatten(), Linear(features_in=pixels, features_out=latent)),
        decoder=(Linear(features_in=latent, features_out=pixels), CLAMP, Unflatten(shape=image_shape)),
        fitted=True,
    )


@torch.no_grad()
def fit_principal(autoencoder: Autoencoder, images: Tensor) -> None:
    """Give a `principal` autoencoder its weights: with the d largest eigenvectors V of the images' covariance

        Enc(x) = V^T (x - m),    Dec(z) = clamp(V z + m),    m the mean image

    Args:
        images: float32 [n, c, h, w]. Of the n pixels and the n images it is the fewer that costs: their number cubed.

    Raises:
        ValueError: fewer images than latents.
    """
    latent = autoencoder.spec.latent
    if len(images) <= latent:
        raise ValueError(f"{latent} principal components need more images than {len(images)}")
    rows = images.flatten(1)
    mean = rows.mean(dim=0)
    rows = rows - mean
    n, pixels = rows.shape
    if pixels <= n:
        _, vectors = torch.linalg.eigh((rows.T @ rows).double())
        basis = vectors[:, -latent:].flip(1)
    else:  # of the same non-zero eigenvalues: X X^T u = s u gives X^T u
        _, vectors = torch.linalg.eigh((rows @ rows.T).double())
        basis, _ = torch.linalg.qr(rows.T.double() @ vectors[:, -latent:].flip(1))
    basis = (basis * basis.sum(dim=0).sign()).float()  # a sign is the library's choice; this one is ours
    autoencoder.encoder.load_state_dict({"1.weight": basis.T, "1.bias": -(mean @ basis)})
    autoencoder.decoder.load_state_dict({"0.weight": basis, "0.bias": mean})
