"""What is certified is the run's own stack, whole: no file can leave a part of it out, and nothing is spent on one
that does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from defender_support import Trained, spent, tiny, train_here
from oracle_support import Caller, Running
from torch import Tensor, nn

from defender_client import config as configs
from defender_client import stack as stacks
from defender_client.certify import CERTIFIED_FILE, Row
from defender_client.config import CERTIFY_FILE, ConfigError
from defender_client.data import load_test
from defender_client.jobs import certify_job
from defender_client.plan import Plan
from defender_client.pretrain import PRETRAINED_FILE, fresh_stack
from defender_client.smoothing import Smooth
from defender_client.sources import LiveOracle
from defender_client.train import STACK_FILE
from shared.models.denoisers import DenoiserSpec


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A trained run that is not certified yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (configs.CONFIG_FILE, PRETRAINED_FILE, STACK_FILE):
        shutil.copy(trained.run / name, folder / name)
    return folder


def ignore(planned: Plan) -> None:
    pass


def certified(run: Path, server: Running, caller: Caller) -> list[Row]:
    return certify_job(run, None, LiveOracle(server.url, caller.key), {}, ignore).rows


def rewrite(path: Path, changes: dict[str, Any], without: str | None = None) -> None:
    """Change a file's specification, and leave out the weights of a part."""
    spec = stacks.load(path).spec.model_copy(update=changes)
    weights = safetensors.torch.load(path.read_bytes())
    kept = {name: tensor for name, tensor in weights.items() if without is None or not name.startswith(without)}
    assert (len(kept) < len(weights)) == (without is not None)
    safetensors.torch.save_file(kept, path, {"stack": spec.model_dump_json()})


NO_AUTOENCODER = {"autoencoder": None}
NO_DENOISER = {"denoiser": DenoiserSpec(architecture="none")}


def test_certify_reads_the_stack_from_the_run_s_directory_and_takes_all_of_it(
    server: Running, caller: Caller, run: Path, tmp_path: Path, classifier: nn.Module
) -> None:
    """Weights that nobody trained, and that tell the images apart: each has a certificate of its own."""
    config = tiny(tmp_path)
    stack = fresh_stack(stacks.load(run / STACK_FILE).spec, 0).eval()
    assert stack.denoiser is not None
    assert stack.autoencoder is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stack.denoiser.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for parameter in stack.autoencoder.parameters():
            parameter *= 3
    stacks.save(stack, run / STACK_FILE)

    def here(asked: Callable[[Tensor], Tensor]) -> list[tuple[int, float]]:
        """Predictions and radii in front of a local classifier that is shown `asked` of each image."""
        smooth, test = Smooth(lambda images: classifier(asked(images)), 10, 0.25), load_test(config.data, None)
        images = [(image, torch.Generator().manual_seed(idx)) for idx, image in enumerate(test.floats(slice(0, 4)))]
        return [(found.label, found.radius) for found in smooth.certify_each(images, 10, 100, 0.001, 1000)]

    rows = certified(run, server, caller)
    for row, (label, radius) in zip(rows, here(stack), strict=True):
        assert row.predict == label
        assert row.radius == pytest.approx(radius, abs=1e-6)
    assert len({row.radius for row in rows}) > 2
    # With any part left out, or no part in, they would have been others.
    for asked in (stack.denoise, stack.autoencoder, nn.Identity()):
        assert [row.radius for row in rows] != pytest.approx([radius for _, radius in here(asked)], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "without", "told"),
    [
        ({}, "autoencoder.", "does not hold a stack"),
        ({}, "autoencoder.encoder.", "does not hold a stack"),
        ({}, "autoencoder.decoder.", "does not hold a stack"),
        (NO_AUTOENCODER, None, "does not hold a stack"),
        (NO_AUTOENCODER, "autoencoder.", r"differs .* in autoencoder \(it has none\)"),
        (NO_DENOISER, "denoiser.", "differs .* in denoiser"),
        (NO_DENOISER | NO_AUTOENCODER, "", r"differs .* in denoiser, autoencoder \(it has none\)"),
        ({"sigma": 0.5}, None, "differs .* in sigma"),
        ({"classes": 11}, None, "differs .* in classes"),
    ],
)
def test_a_stack_that_is_not_the_whole_of_the_run_s_is_not_certified(
    server: Running, caller: Caller, run: Path, changes: dict[str, Any], without: str | None, told: str
) -> None:
    rewrite(run / STACK_FILE, changes, without)
    with pytest.raises(ConfigError, match=told):
        certified(run, server, caller)
    assert spent(server, caller) == 0
    assert not (run / CERTIFIED_FILE).exists()
    assert not (run / CERTIFY_FILE).exists()


def test_a_pretrained_stack_without_its_autoencoder_is_not_trained(
    server: Running, caller: Caller, run: Path, trained: Trained
) -> None:
    rewrite(run / PRETRAINED_FILE, NO_AUTOENCODER, "autoencoder.")
    with pytest.raises(ConfigError, match=r"pretrained.*differs .* in autoencoder \(it has none\)"):
        train_here(trained.config, run, server.url, caller.key)
    assert spent(server, caller) == 0
