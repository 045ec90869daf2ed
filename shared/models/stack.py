"""The defended stack: denoiser, encoder, decoder in front of a classifier; saved as one safetensors file.

    w = Enc(D(x))    the point the search moves, of dimension d (without an autoencoder: w = D(x), in pixels)
    f'(w) = f(Dec(w))    the black box with the decoder merged into it (Zhang et al., ICLR 2022, section 4)

The file says what the stack is, so that nothing can be dropped or forgotten at certification, and so that a server can
put it in front of what it hides: it is data, and never code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shared.models.autoencoder import Autoencoder, AutoencoderSpec
from shared.models.denoisers import DenoiserSpec, build_denoiser
from shared.models.weight_files import ModelError

_METADATA = "stack"


class StackSpec(BaseModel):
    """A stack as data: all that is needed to build it, but for the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    classes: PositiveInt
    sigma: PositiveFloat
    denoiser: DenoiserSpec
    autoencoder: AutoencoderSpec | None


class Stack(nn.Module):
    """What the defender owns. Without denoiser and autoencoder it is the undefended classifier's identity."""

    def __init__(self, spec: StackSpec) -> None:
        super().__init__()
        self.spec = spec
        self.denoiser = build_denoiser(spec.denoiser, spec.image_shape[0])
        self.autoencoder = Autoencoder(spec.autoencoder) if spec.autoencoder is not None else None
        if self.autoencoder is not None:
            frozen = self.autoencoder if self.autoencoder.spec.fitted else self.autoencoder.decoder
            frozen.requires_grad_(False)

    @property
    def dimension(self) -> int:
        """d, the number of coordinates the search moves."""
        c, h, w = self.spec.image_shape
        return self.spec.autoencoder.latent if self.spec.autoencoder is not None else c * h * w

    @property
    def device(self) -> torch.device:
        """Where its weights are. What goes in may be elsewhere; what comes out is there."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def denoise(self, images: Tensor) -> Tensor:
        """D(x): images [b, c, h, w] -> [b, c, h, w], not clamped."""
        images = images.to(self.device)
        return images if self.denoiser is None else self.denoiser(images)

    def front(self, images: Tensor) -> Tensor:
        """w = Enc(D(x)) [b, d] of images [b, c, h, w]; the part that is trained."""
        return self.encode(self.denoise(images))

    def encode(self, denoised: Tensor) -> Tensor:
        """w [b, d] of denoised images [b, c, h, w]."""
        points = denoised if self.autoencoder is None else self.autoencoder.encode(denoised)
        return points.flatten(1)

    def back(self, points: Tensor) -> Tensor:
        """Images in [0, 1] [b, c, h, w] for the oracle from points [b, d]; frozen, merged into the black box."""
        points = points.to(self.device)
        if self.autoencoder is not None:
            return self.autoencoder.decode(points)
        # The oracle takes images in [0, 1]; clamping is part of the base classifier that is smoothed.
        return points.view(-1, *self.spec.image_shape).clamp(0.0, 1.0)

    def forward(self, images: Tensor) -> Tensor:
        """The images the oracle is asked about in place of `images`."""
        return self.back(self.front(images))

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of the denoiser and the encoder."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def save(stack: Stack, path: Path) -> None:
    """Write weights and specification to one safetensors file, whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in stack.state_dict().items()}
    write_safetensors(tensors, path, {_METADATA: stack.spec.model_dump_json()})


def load(path: Path) -> Stack:
    """A stack from its file, in evaluation mode.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        with safe_open(path, "pt") as opened:
            spec = StackSpec.model_validate_json((opened.metadata() or {})[_METADATA])
        stack = Stack(spec)
        stack.load_state_dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (SafetensorError, KeyError, ValidationError, RuntimeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} does not hold a stack: {error}") from None
    return stack.eval()


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file so that a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # An empty tensor set is legal: the undefended stack has no weights.
    safetensors.torch.save_file(tensors, temporary, metadata)
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, path)
