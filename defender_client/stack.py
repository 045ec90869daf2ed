"""The defended stack of a run: which one its configuration means, and the file that it is in."""

from __future__ import annotations

import math
from pathlib import Path

from defender_client.config import CONFIG_FILE, AutoencoderConfig, ConfigError, RunConfig
from shared.models import stack as stacks
from shared.models.autoencoder import AutoencoderSpec, Shape, paper, principal, pyramid
from shared.models.stack import Stack, StackSpec, save, write_safetensors
from shared.models.weight_files import ModelError

__all__ = ["Stack", "StackSpec", "check_matches", "load", "save", "specify", "write_safetensors"]


def specify(config: RunConfig, image_shape: Shape, classes: int) -> StackSpec:
    """The stack a configuration means for images of this shape; ConfigError where they do not fit."""
    return StackSpec(
        image_shape=image_shape,
        classes=classes,
        sigma=config.sigma,
        denoiser=config.denoiser,
        autoencoder=_autoencoder(config.autoencoder, image_shape),
    )


def _autoencoder(config: AutoencoderConfig, image_shape: Shape) -> AutoencoderSpec | None:
    if config.architecture == "none":
        return None
    if config.architecture == "pca":
        pixels = math.prod(image_shape)
        if config.latent > pixels:
            raise ConfigError(
                f"autoencoder.latent={config.latent}: images {list(image_shape)} have {pixels} components"
            )
        return principal(image_shape, config.latent)
    of_the_paper = paper(image_shape, config.latent)
    if config.architecture == "paper" and of_the_paper is None:
        raise ConfigError(
            "the paper's autoencoders take images [3, 32, 32] to 192 latents, [3, 96, 96] to 576 and [1, 28, 28] to "
            f"192, not {list(image_shape)} to {config.latent}: set autoencoder.architecture=pyramid"
        )
    if config.architecture == "pyramid" or of_the_paper is None:
        return pyramid(image_shape, config.latent, config.width)
    return of_the_paper


def load(path: Path) -> Stack:
    """A stack from its file, in evaluation mode; ConfigError if there is none or it cannot be read."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist: the run has no weights yet (start it with `train`)")
    try:
        return stacks.load(path)
    except ModelError as error:
        raise ConfigError(str(error)) from None


def check_matches(spec: StackSpec, meant: StackSpec, path: Path) -> None:
    """ConfigError unless the stack in `path` is, part for part, the one that its run's configuration means.

    A file is believed about what is in it. That a part was left out, only the configuration can tell.
    """
    differing = [name for name in StackSpec.model_fields if getattr(spec, name) != getattr(meant, name)]
    if differing:
        told = [name if getattr(spec, name) is not None else f"{name} (it has none)" for name in differing]
        raise ConfigError(
            f"{path} differs from what {CONFIG_FILE} beside it describes in {', '.join(told)}: "
            "put the run's own file back, or start again in another --out"
        )
