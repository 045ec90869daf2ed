"""Other people's attacks, as their authors wrote them, against a live oracle; the ledger has what an adapter counts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from defender_support import MAX_ROWS, Trained, spent
from oracle_support import Running, running
from torch import Tensor, nn

from defender_client import (
    BudgetExhausted,
    ConfigError,
    Counted,
    Defended,
    NoGradients,
    OracleModule,
    RemoteOracle,
    Smooth,
    Smoothed,
    art_classifier,
    foolbox_model,
    load_stack,
    make_estimator,
)
from defender_client.config import DataConfig
from defender_client.data import load_test
from defender_client.train import STACK_FILE
from oracle_server.settings import Settings


@pytest.fixture(scope="module")
def shown() -> tuple[Tensor, Tensor]:
    """The first test images [8, 1, 8, 8] and their labels."""
    test = load_test(DataConfig(dataset="digits"), None)
    return test.floats(slice(0, 8)), torch.as_tensor(test.labels[:8]).long()


@contextmanager
def library() -> Iterator[Any]:
    """Other people's code warns of what it does itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def client(server: Running, budget: int) -> Iterator[tuple[RemoteOracle, Any]]:
    caller = server.caller(budget)
    with RemoteOracle(server.url, caller.key, retry_seconds=20) as oracle:
        yield oracle, caller


# --- counted ---------------------------------------------------------------------------------------------------------


def test_an_oracle_is_asked_in_batches_that_it_takes(server: Running, classifier: nn.Module) -> None:
    images = torch.rand(2 * MAX_ROWS + 3, 1, 8, 8)
    with client(server, 2000) as (oracle, caller):
        oracle(images[:2])
        asked = Counted(oracle)
        assert (asked.image_shape, asked.classes, asked.batch) == ((1, 8, 8), 10, MAX_ROWS)
        found = asked(images.requires_grad_())
        assert not found.requires_grad
        np.testing.assert_allclose(found, classifier(images.detach()), atol=1e-4)
        assert asked.queries == len(images) == spent(server, caller) - 2
    assert Counted(oracle, batch=7).batch == 7


def test_rows_of_a_function_are_counted_too(classifier: nn.Module) -> None:
    with pytest.raises(ConfigError, match="image_shape and classes"):
        Counted(classifier)
    sizes = []

    def function(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return classifier(images)

    asked = Counted(function, image_shape=(1, 8, 8), classes=10, batch=3)
    array = asked(np.zeros((7, 1, 8, 8)))
    assert sizes == [3, 3, 1]
    assert (array.shape, array.dtype, asked.queries) == ((7, 10), np.float32, 7)
    assert asked(torch.zeros(0, 1, 8, 8)).shape == (0, 10)
    wrong = Counted(classifier, image_shape=(1, 8, 8), classes=9)
    with pytest.raises(ValueError, match=r"\[1, 9\], not \[1, 10\]"):
        wrong(torch.zeros(1, 1, 8, 8))
    assert wrong.queries == 0


# --- ART -------------------------------------------------------------------------------------------------------------


def hop_skip_jump(asked: Counted) -> Any:
    attacks = pytest.importorskip("art.attacks.evasion")
    return attacks.HopSkipJump(
        art_classifier(asked), norm=2, max_iter=2, max_eval=40, init_eval=10, init_size=20, verbose=False
    )


def test_arts_attack_is_counted_as_the_ledger_counts_it(
    server: Running, classifier: nn.Module, shown: tuple[Tensor, Tensor]
) -> None:
    images = shown[0][:2]
    with client(server, 10_000) as (oracle, caller), library():
        asked = Counted(oracle)
        np.random.seed(0)
        adversarial = hop_skip_jump(asked).generate(images.numpy())
        assert asked.queries == spent(server, caller) > 100
    with torch.no_grad():
        before, after = classifier(images).argmax(1), classifier(torch.from_numpy(adversarial)).argmax(1)
    assert (before != after).all(), "the attack that asked over the wire fools the classifier behind it"
    assert ((adversarial >= 0) & (adversarial <= 1)).all()


def test_a_budget_that_ends_in_an_attack_ends_it(server: Running, shown: tuple[Tensor, Tensor]) -> None:
    with client(server, 90) as (oracle, caller), library():
        asked = Counted(oracle)
        np.random.seed(0)
        with pytest.raises(BudgetExhausted):
            hop_skip_jump(asked).generate(shown[0][:2].numpy())
        assert 0 < asked.queries == spent(server, caller) <= 90


# --- Foolbox ---------------------------------------------------------------------------------------------------------


def test_foolboxs_decision_based_attack_is_counted(server: Running, shown: tuple[Tensor, Tensor]) -> None:
    foolbox = pytest.importorskip("foolbox")
    images, labels = shown[0][:2], shown[1][:2]
    with client(server, 10_000) as (oracle, caller), library(), torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)
        asked = Counted(oracle)
        model = foolbox_model(asked)
        start = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(steps=20)
        attack = foolbox.attacks.BoundaryAttack(init_attack=start, steps=20, tensorboard=False)
        _, found, fooled = attack(model, images, labels, epsilons=None)
        assert fooled.all()
        assert asked.queries == spent(server, caller) > 40
        assert (oracle(found).argmax(1) != labels).all()
        assert isinstance(model(images.numpy()), np.ndarray)


def test_foolboxs_gradient_attack_is_told_that_there_are_none(server: Running, shown: tuple[Tensor, Tensor]) -> None:
    foolbox = pytest.importorskip("foolbox")
    with client(server, 100) as (oracle, _), library():
        attack = foolbox.attacks.LinfPGD(steps=2)
        with pytest.raises(NoGradients, match="gives no gradients"):
            attack(foolbox_model(oracle), *shown, epsilons=[0.1])


# --- torch -----------------------------------------------------------------------------------------------------------


def test_square_attack_searches_through_the_module(server: Running, shown: tuple[Tensor, Tensor]) -> None:
    square = pytest.importorskip("pyautoattack.square")
    images, labels = shown[0][:3], shown[1][:3]
    with client(server, 10_000) as (oracle, caller), torch.random.fork_rng():
        module = OracleModule(oracle)
        found = square.SquareAttack(module, norm="L2", n_queries=30, eps=3.0, seed=0).perturb(images, labels)
        assert module.queries == spent(server, caller) > 3
        assert (oracle(found).argmax(1) != labels).any()
        assert float((found - images).flatten(1).norm(dim=1).max()) <= 3.0 + 1e-4


def test_a_backward_pass_is_told_that_there_are_no_gradients(classifier: nn.Module) -> None:
    module = OracleModule(Counted(classifier, image_shape=(1, 8, 8), classes=10))
    images = torch.zeros(1, 1, 8, 8, requires_grad=True)
    scores = module(images)
    with pytest.raises(NoGradients, match="estimate them"):
        scores.sum().backward()
    assert not list(module.parameters())


def test_gradients_may_be_estimated_from_counted_queries(classifier: nn.Module, shown: tuple[Tensor, Tensor]) -> None:
    images = shown[0][:3] * 0.9 + 0.05
    labels = shown[1][:3]

    def gradient(module: nn.Module) -> Tensor:
        x = images.clone().requires_grad_()
        nn.functional.cross_entropy(module(x), labels).backward()
        assert x.grad is not None
        return x.grad.flatten(1)

    asked = Counted(classifier, image_shape=(1, 8, 8), classes=10)
    true = gradient(classifier)
    estimated = gradient(OracleModule(asked, make_estimator("cge", mu=1e-3, difference="central")))
    assert asked.queries == 3 * (1 + 2 * 64)
    assert float(nn.functional.cosine_similarity(estimated, true, dim=1).min()) > 0.99
    np.testing.assert_allclose(estimated.norm(dim=1), true.norm(dim=1), rtol=0.1)
    generator = torch.Generator().manual_seed(0)
    rough = gradient(OracleModule(asked, make_estimator("rge", q=64, generator=generator)))
    assert asked.queries == 3 * (1 + 2 * 64) + 3 * (1 + 65)
    assert float(nn.functional.cosine_similarity(rough, true, dim=1).mean()) > 0.4
    with pytest.raises(ValueError, match="use rge, cge"):
        OracleModule(asked, make_estimator("prior", q=3, generator=generator))


def test_probes_stay_within_what_an_oracle_takes(server: Running) -> None:
    images = torch.zeros(2, 1, 8, 8, requires_grad=True)  # at the edge: a step back is no image
    with client(server, 1000) as (oracle, caller):
        OracleModule(oracle, make_estimator("cge", difference="central"))(images).sum().backward()
        assert spent(server, caller) == 2 * (1 + 2 * 64)


# --- any oracle ------------------------------------------------------------------------------------------------------


def test_the_defended_and_the_smoothed_oracle_are_attacked_as_any(server: Running, trained: Trained) -> None:
    pytest.importorskip("art.estimators.classification")
    images = np.random.default_rng(0).random((2, 1, 8, 8), np.float32)
    with client(server, 1000) as (oracle, caller), library():
        defended = Defended(load_stack(trained.run / STACK_FILE), oracle)
        assert art_classifier(defended).predict(images).shape == (2, 10)
        assert spent(server, caller) == 2
        asked = Counted(Smoothed(defended.smooth(), 20))
        shares = art_classifier(asked).predict(images)
        np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
        assert asked.queries == 40 == spent(server, caller) - 2
        assert Counted(Smoothed(Smooth(defended, 10, 0.5), 5)).image_shape == (1, 8, 8)


def test_an_oracle_that_may_abstain_says_so(tmp_path: Path, trained: Trained) -> None:
    from defender_client import ABSTAIN, export_stack, predicted

    export_stack(trained.run, tmp_path / "stack", ["safetensors"])
    settings = Settings(
        ledger=str(tmp_path / "ledger.db"), defence=tmp_path / "stack", smooth=9, smooth_alpha=0.001, smooth_seed=1
    )
    with running(settings) as robust, client(robust, 10) as (oracle, caller):
        assert (oracle.info.scores, oracle.info.abstains) == ("label", True)
        assert predicted(oracle(torch.rand(3, 1, 8, 8))).tolist() == [ABSTAIN] * 3
        assert spent(robust, caller) == 3
