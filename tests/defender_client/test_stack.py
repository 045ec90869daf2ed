"""The stack: what it computes, what is trained in it, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from defender_support import DNCNN, PIXELS, same_tensors, tiny

from defender_client import stack as stacks
from defender_client.config import ConfigError, load_preset
from defender_client.pretrain import fresh_stack
from defender_client.stack import Stack, specify
from shared.models.autoencoder import paper_cifar, principal

SHAPE = (1, 8, 8)


def built(folder: Path, *settings: str, shape: tuple[int, int, int] = SHAPE) -> Stack:
    return fresh_stack(specify(tiny(folder, *settings), shape, 10), 0).eval()


def images(shape: tuple[int, int, int] = SHAPE, count: int = 5) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 17, 21)])
@pytest.mark.parametrize("settings", [(), DNCNN, PIXELS], ids=["unet", "dncnn", "pixels"])
def test_it_maps_images_to_points_and_points_to_images(
    tmp_path: Path, settings: tuple[str, ...], shape: tuple[int, int, int]
) -> None:
    stack = built(tmp_path, *settings, shape=shape)
    noisy = images(shape) * 3 - 1
    points = stack.front(noisy).detach()
    assert points.shape == (5, stack.dimension)
    asked = stack.back(points)
    assert asked.shape == noisy.shape
    assert 0 <= float(asked.min()) <= float(asked.max()) <= 1
    torch.testing.assert_close(stack(noisy), asked)


def test_in_pixels_a_point_is_the_denoised_image_and_what_is_asked_is_clamped(tmp_path: Path) -> None:
    stack = built(tmp_path, *PIXELS)
    noisy = images() * 3 - 1
    torch.testing.assert_close(stack.front(noisy), stack.denoise(noisy).flatten(1))
    torch.testing.assert_close(stack(noisy), stack.denoise(noisy).clamp(0, 1))
    assert stack.dimension == 64


def test_in_the_latent_a_point_is_the_code_of_the_denoised_image(tmp_path: Path) -> None:
    stack = built(tmp_path)
    assert stack.autoencoder is not None
    torch.testing.assert_close(stack.front(images()), stack.autoencoder.encode(stack.denoise(images())))
    torch.testing.assert_close(stack(images()), stack.autoencoder.decode(stack.front(images())))
    assert stack.dimension == 8


def test_the_undefended_stack_is_the_identity_within_the_range_of_pixels() -> None:
    stack = fresh_stack(specify(load_preset("standard"), SHAPE, 10), 0)
    torch.testing.assert_close(stack(images() * 3 - 1), (images() * 3 - 1).clamp(0, 1))
    assert stack.trainable() == []


def test_denoiser_and_encoder_are_trained_and_the_decoder_is_not(tmp_path: Path) -> None:
    stack = built(tmp_path)
    assert stack.denoiser is not None
    assert stack.autoencoder is not None
    wanted = [*stack.denoiser.parameters(), *stack.autoencoder.encoder.parameters()]
    assert [id(p) for p in stack.trainable()] == [id(p) for p in wanted]


def test_of_principal_components_only_the_denoiser_is_trained(tmp_path: Path) -> None:
    stack = built(tmp_path, "autoencoder.architecture=pca")
    assert stack.denoiser is not None
    assert [id(p) for p in stack.trainable()] == [id(p) for p in stack.denoiser.parameters()]
    stacks.save(stack, tmp_path / "stack.safetensors")
    assert [p.shape for p in stacks.load(tmp_path / "stack.safetensors").trainable()] == [
        p.shape for p in stack.trainable()
    ]


def test_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    spec = specify(tiny(tmp_path), SHAPE, 10)
    first, again, other = fresh_stack(spec, 1), fresh_stack(spec, 1), fresh_stack(spec, 2)
    assert torch.equal(torch.random.get_rng_state(), state)  # and the global generator is left as it was
    weights = [torch.cat([p.flatten() for p in stack.parameters()]) for stack in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_which_autoencoder_is_meant(tmp_path: Path) -> None:
    paper = specify(load_preset("zo-ae-ds-cge"), (3, 32, 32), 10).autoencoder
    assert paper == paper_cifar()
    explicit = specify(load_preset("zo-ae-ds-cge", ["autoencoder.architecture=paper"]), (3, 32, 32), 10)
    assert explicit.autoencoder == paper
    assert specify(tiny(tmp_path), (3, 32, 32), 10).autoencoder == stacks.pyramid((3, 32, 32), 8, 8)
    assert specify(tiny(tmp_path, *PIXELS), (3, 32, 32), 10).autoencoder is None
    linear = specify(tiny(tmp_path, "autoencoder.architecture=pca"), SHAPE, 10).autoencoder
    assert linear == principal(SHAPE, 8)
    with pytest.raises(ConfigError, match="64 components"):
        specify(tiny(tmp_path, "autoencoder.architecture=pca", "autoencoder.latent=65"), SHAPE, 10)
    with pytest.raises(ConfigError, match="pyramid"):
        specify(tiny(tmp_path, "autoencoder.architecture=paper"), SHAPE, 10)


@pytest.mark.parametrize("settings", [(), DNCNN, PIXELS], ids=["unet", "dncnn", "pixels"])
def test_a_file_brings_back_the_same_stack(tmp_path: Path, settings: tuple[str, ...]) -> None:
    stack = built(tmp_path, *settings)
    path = tmp_path / "deep" / "stack.safetensors"
    stacks.save(stack, path)
    again = stacks.load(path)
    assert again.spec == stack.spec
    assert not again.training
    assert torch.equal(again(images()), stack(images()))
    stacks.save(again, tmp_path / "again.safetensors")
    assert same_tensors(path, tmp_path / "again.safetensors")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_undefended_stack_has_a_file_too(tmp_path: Path) -> None:
    stack = fresh_stack(specify(load_preset("standard"), SHAPE, 10), 0)
    stacks.save(stack, tmp_path / "stack.safetensors")
    assert stacks.load(tmp_path / "stack.safetensors").spec == stack.spec


def test_files_that_hold_no_stack_are_told(tmp_path: Path) -> None:
    path = tmp_path / "stack.safetensors"
    with pytest.raises(ConfigError, match="train"):
        stacks.load(path)
    stack = built(tmp_path)
    stacks.save(stack, path)
    whole, described = path.read_bytes(), stack.spec.model_dump_json()
    weights = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    bad: list[bytes | tuple[dict[str, torch.Tensor], dict[str, str] | None]] = [
        b"",
        b"nonsense",
        whole[: len(whole) // 2],
        (weights, None),
        (weights, {"stack": "{"}),
        (weights, {"stack": "{}"}),
        (weights, {"stack": specify(tiny(tmp_path, *PIXELS), SHAPE, 10).model_dump_json()}),
        (dict(list(weights.items())[1:]), {"stack": described}),
        ({name: tensor.new_zeros(3) for name, tensor in weights.items()}, {"stack": described}),
    ]
    for content in bad:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            safetensors.torch.save_file(content[0], path, content[1])
        with pytest.raises(ConfigError, match="does not hold a stack"):
            stacks.load(path)


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stack.safetensors"
    stacks.save(built(tmp_path), path)
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("os.replace", "os.fsync"):
        other = built(tmp_path, *DNCNN)
        with monkeypatch.context() as patched:
            patched.setattr(name, killed)
            with pytest.raises(KeyboardInterrupt):
                stacks.save(other, path)
        assert path.read_bytes() == before
    stacks.save(built(tmp_path, *DNCNN), path)  # what is left of the temporary file does no harm
    assert stacks.load(path).spec.denoiser.architecture == "dncnn"
