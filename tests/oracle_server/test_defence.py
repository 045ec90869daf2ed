"""An exported stack in front of the hidden classifier, served: its answers, one query a row, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_support import Running, digits, logits_of, refused, running
from pydantic import ValidationError
from torch import nn
from typer.testing import CliRunner

from oracle_server.cli import app
from oracle_server.defence import defend
from oracle_server.engines import build_engine
from oracle_server.loading import load_classifier
from oracle_server.policy.spec import PolicyError
from oracle_server.settings import Settings
from shared.models import stack as stacks
from shared.models.autoencoder import pyramid
from shared.models.denoisers import DenoiserSpec
from shared.models.manifest import MANIFEST_FILE, WEIGHTS, Manifest, entry_of
from shared.models.stack import Stack, StackSpec
from shared.models.weight_files import ModelError
from shared.wire import protocol

SHAPE = (1, 8, 8)
SIGMA = 0.25


def spec_of(**changes: object) -> StackSpec:
    return StackSpec.model_validate(
        {
            "image_shape": SHAPE,
            "classes": 10,
            "sigma": SIGMA,
            "denoiser": DenoiserSpec(architecture="unet", depth=1, width=4),
            "autoencoder": pyramid(SHAPE, 8, 8),
            **changes,
        }
    )


def write_export(folder: Path, spec: StackSpec, **changes: object) -> Stack:
    """A stack with random weights, and its manifest, as an export writes them."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        stack = Stack(spec).eval()
        for parameter in stack.parameters():  # also of layers that begin at zero
            nn.init.normal_(parameter, std=0.3)
    stacks.save(stack, folder / WEIGHTS)
    values = {
        "versions": {"zo-defense": "0"},
        "preset": "demo",
        "task": "classification",
        "seed": 0,
        "image_shape": spec.image_shape,
        "classes": spec.classes,
        "sigma": spec.sigma,
        "queries": {"train": 5},
        "total_queries": 5,
        "files": {WEIGHTS: entry_of(folder / WEIGHTS)},
    }
    manifest = Manifest.model_validate(values | changes)
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return stack


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stack]:
    folder = tmp_path_factory.mktemp("exported")
    return folder, write_export(folder, spec_of())


def served(folder: Path, defence: Path, **settings: object) -> Settings:
    return Settings.model_validate({"ledger": str(folder / "ledger.db"), "defence": defence} | settings)


@pytest.fixture(scope="module")
def voting(tmp_path_factory: pytest.TempPathFactory, exported: tuple[Path, Stack]) -> Iterator[Running]:
    """An oracle that answers with shares of 40 votes."""
    with running(served(tmp_path_factory.mktemp("voting"), exported[0], smooth=40, smooth_seed=7)) as server:
        yield server


# --- the stack in front ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "compile", "onnxruntime"])
def test_each_engine_computes_the_stack_and_the_classifier_behind_it(exported: tuple[Path, Stack], engine: str) -> None:
    folder, stack = exported
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
    elif engine == "compile":  # which cannot trace this denoiser: its padding depends on the image's size
        folder = folder / "dncnn"
        stack = write_export(folder, spec_of(denoiser=DenoiserSpec(architecture="dncnn", depth=3, width=4)))
    hidden = load_classifier(Settings())
    model, manifest = defend(hidden, folder / MANIFEST_FILE)
    assert manifest.sigma == SIGMA
    computing = build_engine(model, Settings(engine=engine, engine_block=8))
    images = torch.from_numpy(digits(37))
    with torch.no_grad():
        expected = hidden.module(stack(images))
        assert not torch.allclose(expected, hidden.module(images), atol=1.0), "the stack does nothing"
    together = computing(images)
    assert float((together - expected).abs().max()) < 1e-4
    # Bit for bit the same alone: what the stack does to an image depends on no other.
    for row in (0, 17, 36):
        assert torch.equal(computing(images[row : row + 1]), together[row : row + 1])


def test_a_defended_oracle_is_asked_as_any_other(tmp_path: Path, exported: tuple[Path, Stack]) -> None:
    folder, stack = exported
    images = digits(5)
    with running(served(tmp_path, folder)) as server:
        caller = server.caller(100)
        answer = logits_of(caller.infer(images))
        with torch.no_grad():
            expected = load_classifier(Settings()).module(stack(torch.from_numpy(images)))
        np.testing.assert_allclose(answer, expected, atol=1e-4)
        assert caller.budget()["spent"] == 5
        parameters = server.http.get(protocol.METADATA_ROUTE).json()["parameters"]
        assert not {protocol.SCORES_PARAMETER, protocol.SMOOTHING_PARAMETER} & set(parameters)


def test_a_file_that_is_not_the_exported_one_is_refused(tmp_path: Path) -> None:
    write_export(tmp_path, spec_of())
    hidden = load_classifier(Settings())
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelError, match="not the file that was exported"):
        defend(hidden, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        defend(hidden, tmp_path)
    (tmp_path / MANIFEST_FILE).unlink()
    with pytest.raises(ModelError, match="defender-client export"):
        defend(hidden, tmp_path)


def _other_shape(folder: Path) -> None:
    write_export(folder, spec_of(image_shape=(1, 12, 12), autoencoder=None))


def _other_classes(folder: Path) -> None:
    write_export(folder, spec_of(classes=7))


def _other_task(folder: Path) -> None:
    write_export(folder, spec_of(), task="reconstruction")


def _other_sigma(folder: Path) -> None:
    write_export(folder, spec_of(), sigma=0.5)


def _no_weights(folder: Path) -> None:
    write_export(folder, spec_of(), files={"stack.onnx": entry_of(Path(__file__))})


def _foreign(folder: Path) -> None:
    folder.joinpath(MANIFEST_FILE).write_text('{"format": "something else"}')


def _elsewhere(folder: Path) -> None:
    write_export(folder, spec_of())
    text = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(text.replace(WEIGHTS, "../" + WEIGHTS))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_other_shape, r"images \[1, 12, 12\], and the model reads \[1, 8, 8\]"),
        (_other_classes, "7 classes, and the model has 10"),
        (_other_task, "for reconstruction"),
        (_other_sigma, "differ in sigma"),
        (_no_weights, "--format safetensors"),
        (_foreign, "not the manifest"),
        (_elsewhere, "not the manifest"),
    ],
)
def test_an_export_for_something_else_is_refused(tmp_path: Path, write: Callable[[Path], None], said: str) -> None:
    write(tmp_path)
    with pytest.raises(ModelError, match=said):
        defend(load_classifier(Settings()), tmp_path)


# --- smoothed --------------------------------------------------------------------------------------------------------


def test_a_smoothed_row_is_one_query_and_a_share_of_the_votes(voting: Running, exported: tuple[Path, Stack]) -> None:
    caller = voting.caller(100)
    images = digits(6)
    shares = logits_of(caller.infer(images))
    assert caller.budget()["spent"] == 6, "the draws are the operator's: a query is a row of the smoothed classifier"
    np.testing.assert_allclose(shares * 40, np.round(shares * 40), atol=1e-4)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    # Against noise of our own: of 1,000 draws, where the served 40 must be likely.
    hidden, stack = load_classifier(Settings()).module, exported[1]
    generator = torch.Generator().manual_seed(0)
    for image, share in zip(torch.from_numpy(images[:3]), shares[:3], strict=True):
        noisy = image + SIGMA * torch.randn(1000, *SHAPE, generator=generator)
        with torch.no_grad():
            labels = hidden(stack(noisy)).argmax(dim=1)
        p = torch.bincount(labels, minlength=10).numpy() / 1000
        assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / 40) + 0.05).all()


def test_a_retry_and_any_company_have_the_same_votes(voting: Running) -> None:
    caller = voting.caller(100)
    images = digits(4, seed=5)
    first = caller.infer(images, Idempotency_Key="once")
    again = caller.infer(images, Idempotency_Key="once")
    assert np.array_equal(logits_of(first), logits_of(again))
    assert caller.budget()["spent"] == 4
    backwards = logits_of(caller.infer(images[::-1].copy()))
    assert np.array_equal(backwards[::-1], logits_of(first))
    refused(caller.infer(digits(93)), 403, "budget-exhausted")
    assert caller.budget()["spent"] == 8


def test_the_metadata_says_what_an_answer_is(voting: Running) -> None:
    parameters = voting.http.get(protocol.METADATA_ROUTE).json()["parameters"]
    assert parameters[protocol.SCORES_PARAMETER] == "probabilities"
    assert parameters[protocol.SMOOTHING_PARAMETER] == {"sigma": SIGMA, "draws": 40}
    assert parameters[protocol.ABSTAINS_PARAMETER] is False


def test_an_abstention_is_a_row_of_zeros(tmp_path: Path, exported: tuple[Path, Stack]) -> None:
    # 9 votes can never tell two classes apart at 0.001 (2 / 2^9 = 0.004); at 0.01 nine of nine can.
    with running(served(tmp_path, exported[0], smooth=9, smooth_alpha=0.001)) as server:
        caller = server.caller(10)
        assert not logits_of(caller.infer(digits(3))).any()
        assert caller.budget()["spent"] == 3, "an abstention is an answer"
        parameters = server.http.get(protocol.METADATA_ROUTE).json()["parameters"]
        assert parameters[protocol.SCORES_PARAMETER] == "label"
        assert parameters[protocol.ABSTAINS_PARAMETER] is True
        assert parameters[protocol.SMOOTHING_PARAMETER] == {"sigma": SIGMA, "draws": 9, "alpha": 0.001}


def test_a_policy_about_logits_does_not_go_with_votes(tmp_path: Path, exported: tuple[Path, Stack]) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[answers]\ndecimals = 2\n")
    with (
        pytest.raises(PolicyError, match="--smooth answers with votes"),
        running(served(tmp_path, exported[0], smooth=9, policy=policy)),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"smooth": 10}, "--smooth needs --defence"),
        ({"defence": Path("x"), "smooth": 10, "task": "reconstruction"}, "--task reconstruction has none"),
        ({"defence": Path("x"), "smooth_alpha": 0.1}, "--smooth-alpha is of a vote"),
        ({"defence": Path("x"), "smooth_seed": 0}, "--smooth-seed is of a vote"),
        ({"defence": Path("x"), "smooth": 0}, "greater than or equal to 1"),
        ({"defence": Path("x"), "smooth": 9, "smooth_alpha": 1.0}, "less than 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Settings.model_validate(options)


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    ledger = ["--ledger", str(tmp_path / "ledger.db")]
    result = CliRunner().invoke(app, ["serve", *ledger, "--smooth", "10"])
    assert result.exit_code == 2
    assert "--smooth needs --defence" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["serve", *ledger, "--port", "0", "--defence", str(tmp_path)])
    assert result.exit_code == 2
    assert "defender-client export" in result.output
    assert not (tmp_path / "ledger.db").exists()
