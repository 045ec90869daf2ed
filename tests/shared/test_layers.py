"""Layer descriptions: each builds the module it names, and nothing else gets in."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from shared.models.layers import Activation, Conv, ConvTranspose, Flatten, Layer, Linear, Unflatten, build

LAYERS: TypeAdapter[tuple[Layer, ...]] = TypeAdapter(tuple[Layer, ...])

# Description, torch's own module, input shape, output shape worked out by hand.
CASES = [
    (Conv(channels_in=3, channels_out=5, kernel=3), nn.Conv2d(3, 5, 3), (3, 8, 8), (5, 6, 6)),
    (
        Conv(channels_in=2, channels_out=4, kernel=4, stride=3, padding=1),
        nn.Conv2d(2, 4, 4, stride=3, padding=1),
        (2, 8, 11),
        (4, 3, 4),
    ),
    (ConvTranspose(channels_in=2, channels_out=1, kernel=2), nn.ConvTranspose2d(2, 1, 2), (2, 3, 3), (1, 4, 4)),
    (
        ConvTranspose(channels_in=3, channels_out=4, kernel=3, stride=2, padding=1, output_padding=(1, 0)),
        nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=(1, 0)),
        (3, 4, 4),
        (4, 8, 7),
    ),
    (Linear(features_in=6, features_out=2), nn.Linear(6, 2), (6,), (2,)),
    (Activation(kind="relu"), nn.ReLU(), (5,), (5,)),
    (Activation(kind="sigmoid"), nn.Sigmoid(), (5,), (5,)),
    (Flatten(), nn.Flatten(), (2, 3, 4), (24,)),
    (Unflatten(shape=(2, 3, 4)), nn.Unflatten(1, (2, 3, 4)), (24,), (2, 3, 4)),
]
IDS = [f"{i}-{layer.kind}" for i, (layer, *_) in enumerate(CASES)]


@pytest.mark.parametrize(("layer", "module", "taken", "given"), CASES, ids=IDS)
def test_builds_torch_s_module(layer: Layer, module: nn.Module, taken: tuple[int, ...], given: tuple[int, ...]) -> None:
    built = layer.build()
    assert isinstance(built, type(module))
    built.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(2, *taken, generator=torch.Generator().manual_seed(0))
    assert built(x).shape == (2, *given)
    # torch's own sigmoid computes the end of a tensor by another function, which may differ in the last bit.
    torch.testing.assert_close(built(x), module(x), rtol=2e-7, atol=0)


@pytest.mark.parametrize("layer", [case[0] for case in CASES], ids=IDS)
def test_json_round_trip(layer: Layer) -> None:
    assert LAYERS.validate_json(LAYERS.dump_json((layer,))) == (layer,)


def test_build_keeps_the_order() -> None:
    network = build((Flatten(), Linear(features_in=4, features_out=3), Activation(kind="relu")))
    assert [type(module) for module in network] == [nn.Flatten, nn.Linear, nn.ReLU]
    assert list(network.state_dict()) == ["1.weight", "1.bias"]
    assert len(build(())) == 0


@pytest.mark.parametrize(
    "text",
    [
        '[{"kind": "eval", "code": "1"}]',
        '[{"kind": "conv", "channels_in": 3, "channels_out": 4, "kernel": 3, "weights": "x.pt"}]',
        '[{"kind": "conv", "channels_in": 0, "channels_out": 4, "kernel": 3}]',
        '[{"kind": "conv", "channels_in": 3, "channels_out": 4, "kernel": 3, "padding": -1}]',
        '[{"kind": "conv", "channels_in": 3, "channels_out": 4, "kernel": 3, "stride": 0}]',
        '[{"kind": "conv-transpose", "channels_in": 3, "channels_out": 4, "kernel": 3, "output_padding": [1]}]',
        '[{"kind": "linear", "features_in": 3}]',
        '[{"kind": "unflatten", "shape": [1, 2]}]',
        '[{"kind": "tanh"}]',
        '[{"channels_in": 3}]',
        '[{"kind": "relu", "inplace": true}]',
        '["relu"]',
    ],
)
def test_nothing_else_gets_in(text: str) -> None:
    with pytest.raises(ValidationError):
        LAYERS.validate_json(text)


def test_descriptions_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Flatten().kind = "flatten"
