"""timm's architectures: `timm:NAME`, with weights of a file or timm's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from oracle_server.sources.extras import need
from oracle_server.sources.network import Network
from shared.models.loading import fill
from shared.models.weight_files import ModelError, WeightsInfo, read_weights

DEFAULT = "DEFAULT"


def load_timm(name: str, weights: str | None, channels: int | None, classes: int | None) -> Network:
    """An architecture of timm's with its weights.

    Args:
        name: as timm has it, with or without a tag: `resnet18`, `resnet18.a1_in1k`.
        weights: a file, or DEFAULT for those that timm names, which are fetched from the hub.
        channels, classes: what is to hold whatever the weights say; None as they say.

    Raises:
        ModelError: timm is not installed or knows no such architecture; or the weights are missing, cannot be read or
            fetched, or do not fit.
    """
    timm = need("timm", "timm", f"'timm:{name}'")
    usual = _usual(timm, name)
    if weights is None:
        raise ModelError(f"'timm:{name}' needs --weights FILE, or --weights DEFAULT for timm's own")
    if weights == DEFAULT:
        return _fetched(timm, name, usual, channels, classes)
    state, info = read_weights(Path(weights))
    in_channels = channels or info.channels or _first(state, usual) or usual["input_size"][0]
    out = classes or info.classes or _last(state, usual) or usual["num_classes"]
    module = _create(timm, name, in_chans=in_channels, num_classes=out)
    fill(module, state)
    return network_of(module, usual, info, (Path(weights),))


def network_of(module: nn.Module, usual: Mapping[str, Any], info: WeightsInfo, files: tuple[Path, ...]) -> Network:
    """A filled network, with what its weights' header or else timm says of the images it was trained on."""
    size = (info.image_size, info.image_size) if info.image_size else tuple(usual["input_size"][1:])
    return Network(
        module.float().eval().requires_grad_(False),
        image_size=(size[0], size[1]),
        mean=info.mean or tuple(usual["mean"]),
        std=info.std or tuple(usual["std"]),
        files=files,
    )


def _usual(timm: Any, name: str) -> dict[str, Any]:
    """What timm says of an architecture (`pretrained_cfg`)."""
    if not timm.is_model(name.partition(".")[0]):
        close = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:3])
        raise ModelError(f"timm has no model '{name}'" + (f": did you mean {close}?" if close else ""))
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ModelError(f"timm has no weights '{name.partition('.')[2]}' of '{name.partition('.')[0]}'") from error
    usual: dict[str, Any] = found.to_dict()
    return usual


def _create(timm: Any, name: str, **options: Any) -> nn.Module:
    try:
        module: nn.Module = timm.create_model(name, **options)
    except Exception as error:  # the architectures raise what they like
        raise ModelError(f"timm cannot make '{name}': {(str(error) or repr(error)).splitlines()[0]}") from error
    return module


def _fetched(timm: Any, name: str, usual: dict[str, Any], channels: int | None, classes: int | None) -> Network:
    """With timm's own weights, which it fetches as safetensors or reads with `weights_only`."""
    for option, asked, has in (
        ("channels", channels, usual["input_size"][0]),
        ("classes", classes, usual["num_classes"]),
    ):
        # timm would fit other numbers in by weights of its own making.
        if asked is not None and asked != has:
            raise ModelError(f"timm's weights of '{name}' have {has} {option}, not {asked}: leave out --{option}")
    return network_of(_create(timm, name, pretrained=True), usual, WeightsInfo(), ())


def _first(state: Mapping[str, Tensor], usual: Mapping[str, Any]) -> int | None:
    """Channels of the images, as the first convolution's weights have them."""
    weight = _named(state, usual.get("first_conv"))
    return weight.shape[1] if weight is not None and weight.ndim == 4 else None


def _last(state: Mapping[str, Tensor], usual: Mapping[str, Any]) -> int | None:
    """Classes, as the last layer's weights have them."""
    weight = _named(state, usual.get("classifier"))
    return None if weight is None else weight.shape[0]


def _named(state: Mapping[str, Tensor], layer: str | tuple[str, ...] | None) -> Tensor | None:
    name = layer[0] if isinstance(layer, tuple) else layer
    return state.get(f"{name}.weight")
