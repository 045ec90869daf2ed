"""A decoder's file: what is written is read back, and nothing else gets in."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor, nn

from shared.models.autoencoder import RELU, SIGMOID, Autoencoder, AutoencoderSpec, paper_cifar, pyramid
from shared.models.decoder import (
    MAX_HEADER_BYTES,
    DecoderError,
    DecoderSpec,
    UnacceptableWeights,
    UnreadableDecoder,
    decoder_id,
    decoder_of,
    read,
    read_spec,
    write,
)
from shared.models.layers import Conv, ConvTranspose, Flatten, Layer, Linear, Unflatten, build

SPECS = [
    paper_cifar(),
    pyramid((1, 8, 8), 8),
    pyramid((3, 32, 32), 48),
    pyramid((3, 17, 23), 5, width=4),
    pyramid((2, 5, 1), 3),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: "x".join(map(str, (*s.image_shape, s.latent))))


def small() -> tuple[DecoderSpec, dict[str, Tensor]]:
    torch.manual_seed(0)
    return decoder_of(Autoencoder(pyramid((1, 8, 8), 8)))


def mlp(latent: int = 4, hidden: int = 3, **changes: Any) -> dict[str, Any]:
    """A small decoder's specification as JSON has it."""
    layers: tuple[Layer, ...] = (
        Linear(features_in=latent, features_out=hidden),
        RELU,
        Linear(features_in=hidden, features_out=12),
        SIGMOID,
        Unflatten(shape=(3, 2, 2)),
    )
    spec = {"latent": latent, "image_shape": [3, 2, 2], "layers": [layer.model_dump(mode="json") for layer in layers]}
    return spec | changes


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A file's header and its tensors' bytes, by hand: 8 bytes of length, JSON, bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@every_spec
def test_what_is_written_is_read_back(spec: AutoencoderSpec) -> None:
    autoencoder = Autoencoder(spec)
    decoder, state = decoder_of(autoencoder)
    content = write(decoder, state)
    for kind in (bytes, bytearray, memoryview):
        found, tensors = read(kind(content))
        assert found == decoder == read_spec(kind(content))
        assert tensors.keys() == autoencoder.decoder.state_dict().keys() == decoder.tensors().keys()
        assert all(torch.equal(tensors[name], state[name]) for name in state)
    module = build(found.layers)
    module.load_state_dict(tensors)
    latents = torch.rand(3, spec.latent)
    assert torch.equal(module(latents), autoencoder.decode(latents))
    assert module(latents).shape[1:] == found.image_shape


@every_spec
def test_cost_is_torch_s(spec: AutoencoderSpec) -> None:
    decoder, state = decoder_of(Autoencoder(spec))
    cost = decoder.cost()
    assert cost.weight_bytes == 4 * sum(tensor.numel() for tensor in state.values())
    # Counted independently: each product by a hook, each row's elements as the layers really give them.
    multiply_adds, held = 0, [spec.latent]

    def count(module: nn.Module, taken: tuple[Tensor], given: Tensor) -> None:
        nonlocal multiply_adds
        held.append(taken[0].numel() + given.numel())
        if isinstance(module, nn.ConvTranspose2d):
            multiply_adds += taken[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            multiply_adds += module.weight.numel()
        elif not isinstance(module, nn.Unflatten | nn.Flatten):
            multiply_adds += given.numel()

    module = build(decoder.layers)
    for layer in module:
        layer.register_forward_hook(count)  # type: ignore[arg-type]
    module(torch.rand(1, spec.latent))
    assert cost.multiply_adds == multiply_adds
    assert cost.activations >= max(held)


def test_written_the_same_every_time_and_named_by_content() -> None:
    spec, state = small()
    content = write(spec, state)
    backwards = dict(reversed(state.items()))
    assert write(spec, backwards) == content
    names = {decoder_id(*read(content)), decoder_id(spec, backwards)}
    # The same tensors in another order in the file, as another program may write them.
    header, data = split(content)
    first, *rest = sorted(state)
    moved, moved_data = {"__metadata__": header["__metadata__"]}, b""
    for name in [*rest, first]:
        start, stop = header[name]["data_offsets"]
        end = len(moved_data) + stop - start
        moved[name] = header[name] | {"data_offsets": [len(moved_data), end]}
        moved_data += data[start:stop]
    assert join(moved, moved_data) != content
    names.add(decoder_id(*read(join(moved, moved_data))))
    assert len(names) == 1
    (name,) = names
    assert len(name) == 32
    assert int(name, 16) >= 0
    state[first] = state[first] + 1e-6
    assert decoder_id(spec, state) != name


def test_other_readers_can_read_it(tmp_path: Path) -> None:
    spec, state = small()
    (tmp_path / "decoder.safetensors").write_bytes(write(spec, state))
    with safe_open(tmp_path / "decoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["decoder"]) == spec.model_dump(mode="json")
        assert {name: file.get_slice(name).get_dtype() for name in file.keys()} == dict.fromkeys(state, "F32")  # noqa: SIM118


BAD_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "code": (mlp(layers=[{"kind": "eval", "code": "1"}]), "kind"),
    "more fields": (mlp(hook="os.system"), "hook"),
    "no layer": (mlp(layers=[]), r"rows \[4\]"),
    "another image": (mlp(image_shape=[3, 4, 1]), "image_shape"),
    "another latent": (mlp() | {"latent": 5}, "layer 0"),
    "no latent": (mlp() | {"latent": 0}, "latent"),
    "layers that do not meet": (mlp(layers=[*mlp(hidden=5)["layers"][:2], *mlp()["layers"][2:]]), "layer 2"),
    "no sigmoid": (mlp(layers=[*mlp()["layers"][:3], mlp()["layers"][4]]), "sigmoid"),
    "after the sigmoid": (mlp(layers=[*mlp()["layers"], {"kind": "relu"}]), "sigmoid"),
    "a wide stride": (
        {
            "latent": 1,
            "image_shape": [1, 1, 1],
            "layers": [
                {"kind": "unflatten", "shape": [1, 1, 1]},
                {"kind": "conv-transpose", "channels_in": 1, "channels_out": 1, "kernel": 1, "stride": 10**30},
                {"kind": "sigmoid"},
            ],
        },
        "stride",
    ),
}


@pytest.mark.parametrize(("spec", "why"), BAD_SPECS.values(), ids=BAD_SPECS)
def test_what_is_no_decoder(spec: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        DecoderSpec.model_validate_json(json.dumps(spec))
    content = safetensors.torch.save({"x": torch.zeros(1)}, {"decoder": json.dumps(spec)})
    with pytest.raises(UnreadableDecoder, match=why):
        read(content)


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ((Conv(channels_in=1, channels_out=1, kernel=3, padding=3),), "padding"),
        ((Conv(channels_in=1, channels_out=1, kernel=5),), "larger"),
        ((Conv(channels_in=2, channels_out=1, kernel=1),), r"\[2, h, w\]"),
        ((ConvTranspose(channels_in=1, channels_out=1, kernel=2, output_padding=(1, 0)),), "output_padding"),
        ((ConvTranspose(channels_in=1, channels_out=1, kernel=4, padding=3),), "leaves nothing"),
        ((ConvTranspose(channels_in=3, channels_out=1, kernel=2),), r"\[3, h, w\]"),
        ((Linear(features_in=4, features_out=4),), r"\[4\]"),
        ((Flatten(), Unflatten(shape=(1, 2, 3))), r"\[6\]"),
    ],
)
def test_layers_that_do_not_fit(layers: tuple[Layer, ...], why: str) -> None:
    with pytest.raises(ValidationError, match=f"layer .*{why}"):
        DecoderSpec(latent=4, image_shape=(1, 2, 2), layers=(Unflatten(shape=(1, 2, 2)), *layers, SIGMOID))


def test_enormous_layers_cost_only_arithmetic() -> None:
    n = 10**9
    linear = (Linear(features_in=n, features_out=n), SIGMOID, Unflatten(shape=(n, 1, 1)))
    spec = DecoderSpec(latent=n, image_shape=(n, 1, 1), layers=linear)
    assert spec.cost().weight_bytes == 4 * (n * n + n)
    with pytest.raises(UnreadableDecoder, match=r"0\.bias.* missing"):
        read(safetensors.torch.save({"0.weight": torch.zeros(1)}, {"decoder": spec.model_dump_json()}))


Change = Callable[[dict[str, Any], bytes], bytes]


def _with(name: str, **changes: Any) -> Change:
    return lambda header, data: join(header | {name: header[name] | changes}, data)


HOSTILE: dict[str, tuple[Change, str]] = {
    "empty": (lambda h, d: b"", "cut short"),
    "short": (lambda h, d: b"\0" * 7, "cut short"),
    "a pickle": (lambda h, d: b"\x80\x04\x95" + b"." * 200, "cut short"),
    "a huge header": (lambda h, d: struct.pack("<Q", 2**63) + join(h, d)[8:], "longer than the file"),
    "a long header": (lambda h, d: join(b" " * (MAX_HEADER_BYTES + 1), d), "at most"),
    "no JSON": (lambda h, d: join(b"{", d), "not JSON"),
    "deep JSON": (lambda h, d: join(b"[" * 100_000, d), "not JSON"),
    "long numbers": (lambda h, d: join(b'{"x": ' + b"9" * 100_000 + b"}", d), "not JSON"),
    "no text": (lambda h, d: join(b"\xff\xfe", d), "not JSON"),
    "an array": (lambda h, d: join(b"[]", d), "no JSON object"),
    "doubles": (lambda h, d: join(json.dumps(h).encode()[:-1] + b', "0.bias": {}}', d), "twice"),
    "no metadata": (lambda h, d: join({k: v for k, v in h.items() if k != "__metadata__"}, d), "metadata"),
    "other metadata": (lambda h, d: join(h | {"__metadata__": {"stack": "{}"}}, d), "metadata"),
    "a number as metadata": (lambda h, d: join(h | {"__metadata__": {"decoder": 1}}, d), "metadata"),
    "half a character": (lambda h, d: join(h | {"__metadata__": {"decoder": "\ud800"}}, d), "no text"),
    "half a character in a name": (lambda h, d: join(h | {"\ud800": h["0.bias"]}, d), "ud800"),
    "missing": (lambda h, d: join({k: v for k, v in h.items() if k != "0.bias"}, d), "missing"),
    "extra": (lambda h, d: join(h | {"9.weight": h["0.bias"]}, d), "no weight '9.weight'"),
    "half precision": (_with("0.bias", dtype="F16"), "not float32"),
    "unknown precision": (_with("0.bias", dtype="F2048"), "not float32"),
    "no entry": (lambda h, d: join(h | {"0.bias": 1}, d), "not float32"),
    "shape": (_with("0.bias", shape=[1]), "has shape"),
    "no shape": (_with("0.bias", shape="x"), "has shape"),
    "fractions": (_with("0.bias", shape=[512.0]), "cannot be read"),
    "offsets that overlap": (_with("0.weight", data_offsets=[0, 16384]), "cannot be read"),
    "offsets beyond": (_with("0.bias", data_offsets=[2**40, 2**40 + 2048]), "cannot be read"),
    "offsets backwards": (_with("0.bias", data_offsets=[2048, 0]), "cannot be read"),
    "cut": (lambda h, d: join(h, d[:-1]), "cannot be read"),
    "more": (lambda h, d: join(h, d + b"\0"), "cannot be read"),
}


@pytest.mark.parametrize(("change", "why"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(change: Change, why: str) -> None:
    header, data = split(write(*small()))
    with pytest.raises(UnreadableDecoder, match=why):
        read(change(header, data))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_are_finite(value: float) -> None:
    spec, state = small()
    state["0.weight"][3, 2] = value
    with pytest.raises(UnacceptableWeights, match=r"0\.weight"):
        write(spec, state)
    content = safetensors.torch.save(state, {"decoder": spec.model_dump_json()})
    with pytest.raises(UnacceptableWeights, match=r"0\.weight"):
        read(content)


def test_only_its_own_weights_are_written() -> None:
    spec, state = small()
    with pytest.raises(DecoderError, match="float64"):
        write(spec, {name: tensor.double() for name, tensor in state.items()})
    with pytest.raises(DecoderError, match="missing"):
        write(spec, {})
    with pytest.raises(DecoderError, match="no weight 'x'"):
        write(spec, state | {"x": torch.zeros(1)})


def test_an_autoencoder_without_a_sigmoid() -> None:
    whole = pyramid((1, 8, 8), 8)
    with pytest.raises(DecoderError, match="sigmoid"):
        decoder_of(Autoencoder(whole.model_copy(update={"decoder": whole.decoder[:-1]})))
