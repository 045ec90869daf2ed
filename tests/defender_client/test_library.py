"""What other programs import: cheap to import, all there, documented; the defended stack and a vote as oracles."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from defender_support import Trained, spent
from oracle_support import Caller, Running, digits
from torch import Tensor, nn

import defender_client
from defender_client import ABSTAIN, Defended, RemoteOracle, Smooth, Smoothed, load_stack, predicted
from defender_client.train import STACK_FILE


def test_importing_the_package_loads_nothing_else() -> None:
    probe = (
        "import sys, defender_client; assert 'torch' not in sys.modules and 'httpx' not in sys.modules;"
        "from defender_client import BudgetExhausted; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, timeout=60)


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    assert set(defender_client.__all__) <= set(dir(defender_client))
    for name in defender_client.__all__:
        value = getattr(defender_client, name)
        assert isinstance(value, int) or (value.__doc__ or "").strip(), f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = defender_client.nothing


def test_a_remote_oracle_takes_arrays_and_tensors(oracle: RemoteOracle, classifier: nn.Module) -> None:
    images = digits(3)
    from_array, from_tensor = oracle(images.astype(np.float64)), oracle(torch.from_numpy(images))
    assert isinstance(from_array, np.ndarray)
    assert isinstance(from_tensor, Tensor)
    assert np.array_equal(from_array, from_tensor.numpy())
    np.testing.assert_allclose(from_array, classifier(torch.from_numpy(images)), atol=1e-4)


def test_the_defended_stack_in_front_of_an_oracle_is_an_oracle(
    server: Running, caller: Caller, oracle: RemoteOracle, classifier: nn.Module, trained: Trained
) -> None:
    stack = load_stack(trained.run / STACK_FILE)
    images = torch.from_numpy(digits(5)) * 1.5 - 0.25  # noise may go beyond [0, 1]
    there, here = Defended(stack, oracle), Defended(stack, classifier)
    with torch.no_grad():
        expected = classifier(stack(images))
    np.testing.assert_allclose(there(images), expected, atol=1e-4)
    assert torch.equal(here(images), expected)
    assert there.cost == spent(server, caller) == 5
    assert here.cost is None
    smooth = there.smooth()
    assert (smooth.classes, smooth.sigma) == (10, 0.25)
    certificate = smooth.certify(torch.from_numpy(digits(1)[0]), n0=10, n=50, alpha=0.01)
    assert spent(server, caller) == 5 + 60
    assert certificate.label == ABSTAIN or certificate.radius > 0


def test_a_generator_left_out_is_torchs_own(classifier: nn.Module) -> None:
    smooth, x = Smooth(classifier, 10, 0.5), torch.from_numpy(digits(1)[0])
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert smooth.certify(x, 10, 90, 0.01) == smooth.certify(x, 10, 90, 0.01, 7, generator)
        torch.manual_seed(6)
        generator.manual_seed(6)
        assert smooth.predict(x, 50, 0.01) == smooth.predict(x, 50, 0.01, 7, generator)


def test_a_smoothed_classifier_is_an_oracle_of_shares(
    server: Running, caller: Caller, oracle: RemoteOracle, classifier: nn.Module
) -> None:
    images = torch.from_numpy(digits(2))
    generator = torch.Generator().manual_seed(1)
    local = Smoothed(Smooth(classifier, 10, 0.5), 30, generator=generator)
    shares = local(images)
    assert local.cost == 60
    generator.manual_seed(1)
    votes = torch.stack([Smooth(classifier, 10, 0.5).votes(x, 30, generator=generator) for x in images])
    assert torch.equal(shares, votes / 30)

    def clamped(noisy: Tensor) -> Tensor:
        return oracle(noisy.clamp(0, 1))

    assert Smoothed(Smooth(clamped, 10, 0.5), 30)(images).shape == (2, 10)
    assert spent(server, caller) == 60


def test_a_row_of_zeros_is_an_abstention() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-2.0, -1.0, -0.5]])
    assert predicted(scores).tolist() == [ABSTAIN, 1, 2]
