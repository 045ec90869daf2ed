"""Losses per row, against their definition."""

from __future__ import annotations

import math

import pytest
import torch

from defender_client.losses import cross_entropy, mean_log_scores, stability_labels


def test_cross_entropy_is_the_definition_row_by_row() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [2.0, -1.0, 0.5]])
    losses = cross_entropy(logits, torch.tensor([1, 2]))
    expected = [math.log(3.0), math.log(math.exp(2.0) + math.exp(-1.0) + math.exp(0.5)) - 0.5]
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0.0)


def test_cross_entropy_keeps_differences_that_float32_loses() -> None:
    logits = torch.tensor([[8.0, 0.0], [8.0 + 2**-20, 0.0]])
    losses = cross_entropy(logits, torch.tensor([0, 0]))
    # dl/dlogit = p - 1 = -1 / (1 + e^8)
    assert float(losses[1] - losses[0]) == pytest.approx(-(2**-20) / (1 + math.exp(8)), rel=1e-4)


def test_cross_entropy_gradient_is_p_minus_y() -> None:
    logits = torch.tensor([[0.3, -1.2, 0.8]], requires_grad=True)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([0])).sum(), logits)
    expected = torch.softmax(logits.detach(), 1) - torch.tensor([[1.0, 0.0, 0.0]])
    torch.testing.assert_close(gradient, expected)


def test_stability_labels_are_the_oracles_own() -> None:
    assert stability_labels(torch.tensor([[0.1, 0.9], [3.0, -3.0]])).tolist() == [1, 0]


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels \[n\]"):
        cross_entropy(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"logits \[n, k\]"):
        cross_entropy(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[n, k\]"):
        stability_labels(torch.zeros(2, 2, 2))


def test_mean_log_scores_are_the_log_of_the_mean_softmax() -> None:
    logits = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = logits.double().softmax(dim=2).mean(dim=0).log()
    torch.testing.assert_close(mean_log_scores(logits), expected)
    torch.testing.assert_close(mean_log_scores(logits[:1]), logits[0].double().log_softmax(dim=1))
    labels = torch.tensor([0, 3, 2])
    torch.testing.assert_close(cross_entropy(mean_log_scores(logits), labels), -expected[range(3), labels])


def test_mean_log_scores_have_a_gradient_where_softmax_is_nothing() -> None:
    logits = torch.tensor([[[2000.0, 0.0]], [[1500.0, 0.0]]], requires_grad=True)
    scores = mean_log_scores(logits)
    assert scores[0].tolist() == pytest.approx([0.0, -1500 - math.log(2)])
    (gradient,) = torch.autograd.grad(scores[0, 1], logits)
    # The draw that is nearer to the class has all the weight: d(-z)/dz = (-1, 1) there.
    torch.testing.assert_close(gradient, torch.tensor([[[0.0, 0.0]], [[-1.0, 1.0]]]))


def test_mean_log_scores_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[m, b, k\]"):
        mean_log_scores(torch.zeros(2, 3))
