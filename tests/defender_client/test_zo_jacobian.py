"""Gradients, Gauss-Newton directions and predictions from a Jacobian, against autograd and dense algebra."""

from __future__ import annotations

import pytest
import torch
from zo_support import network, rows_of, seeded

from defender_client.objective import RECONSTRUCTION, STABILITY, Objective
from defender_client.zo import CGE, RGE, jacobian

B, D, K = 6, 9, 5
TARGETS = {STABILITY.name: torch.arange(B) % K, RECONSTRUCTION.name: torch.randn(B, K, generator=seeded(8))}
both = pytest.mark.parametrize("objective", [STABILITY, RECONSTRUCTION], ids=lambda objective: objective.name)


def points() -> torch.Tensor:
    return torch.randn(B, D, generator=seeded(), dtype=torch.float64)


def true_jacobians() -> torch.Tensor:
    """df/dw [b, d, k] by autograd."""
    whole = torch.autograd.functional.jacobian(lambda w: network(D)(w).sum(0), points())
    return whole.permute(1, 2, 0)


def test_central_differences_of_all_coordinates_are_the_jacobian() -> None:
    estimator = CGE(difference="central")
    probes = estimator.ask(points())
    derived = estimator.derive(network(D)(rows_of(probes)).view(*probes.shape[:2], K))
    torch.testing.assert_close(derived, true_jacobians(), rtol=1e-4, atol=1e-6)


def test_independent_directions_have_none() -> None:
    estimator = RGE(3, generator=seeded())
    probes = estimator.ask(points())
    with pytest.raises(ValueError, match="orthonormal"):
        estimator.derive(torch.zeros(*probes.shape[:2], K))


@both
def test_the_gradient_of_any_loss_is_that_of_autograd(objective: Objective) -> None:
    at, targets = points().requires_grad_(True), TARGETS[objective.name]
    answers = network(D)(at)
    (truth,) = torch.autograd.grad(objective.losses(answers, targets).sum(), at)
    found = jacobian.gradient(true_jacobians(), objective.slopes(answers.detach(), targets))
    torch.testing.assert_close(found, truth)


@both
def test_the_root_is_one_of_the_losses_second_derivative(objective: Objective) -> None:
    answers, targets = network(D)(points()), TARGETS[objective.name]
    roots = objective.root(answers)
    for i in range(B):
        hessian = torch.autograd.functional.hessian(
            lambda f, i=i: objective.losses(f.unsqueeze(0), targets[i : i + 1]).sum(), answers[i]
        )
        torch.testing.assert_close(roots[i] @ roots[i].T, hessian, rtol=1e-9, atol=1e-9)


@both
@pytest.mark.parametrize("damping", [0.01, 1.0, 100.0])
def test_the_direction_solves_the_damped_system(objective: Objective, damping: float) -> None:
    """lambda (J H J^T + lambda I)^-1 J dl/df by dense algebra in d dimensions."""
    answers, targets = network(D)(points()), TARGETS[objective.name]
    jacobians, roots = true_jacobians(), objective.root(answers)
    slopes = objective.slopes(answers, targets)
    found = jacobian.gauss_newton(jacobians, slopes, roots, damping)
    for i in range(B):
        curvature = jacobians[i] @ roots[i] @ roots[i].T @ jacobians[i].T
        level = damping * curvature.trace() / K
        dense = torch.linalg.solve(curvature + level * torch.eye(D).double(), jacobians[i] @ slopes[i]) * level
        torch.testing.assert_close(found[i], dense, rtol=1e-6, atol=1e-9)


def test_where_nothing_is_curved_the_direction_is_the_gradient() -> None:
    slopes = torch.randn(B, K, generator=seeded(), dtype=torch.float64)
    flat = torch.zeros(B, K, K, dtype=torch.float64)
    jacobians = true_jacobians()
    found = jacobian.gauss_newton(jacobians, slopes, flat, 1.0)
    torch.testing.assert_close(found, jacobian.gradient(jacobians, slopes))


def test_predictions_are_off_by_the_square_of_the_distance() -> None:
    direction = torch.randn(B, D, generator=seeded(5), dtype=torch.float64)
    errors = []
    for length in (0.02, 0.01):
        moved = length * direction
        predicted = jacobian.predict(true_jacobians(), network(D)(points()), moved)
        errors.append(float((predicted - network(D)(points() + moved)).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
