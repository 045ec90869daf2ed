"""What is compared: one estimator each, the rest alike."""

from __future__ import annotations

from dataclasses import dataclass

_ACTIVE = ("estimator.active=true",)


@dataclass(frozen=True)
class Variant:
    """One line of the frontier.

    Attributes:
        name: of its directory.
        title: in the table.
        settings: what it changes in the base configuration.
        queries: whether its gradients are made of queries; else it is one point, at none.
        preset: what it is based on: the paper's method from scratch, or `zo-ae-ds`, which begins with a denoiser
            trained on MSE.
    """

    name: str
    title: str
    settings: tuple[str, ...]
    queries: bool = True
    preset: str = "zo-ae-ds-cge"


def _zo(name: str, title: str, estimator: str, *settings: str) -> Variant:
    return Variant(name, title, (f"estimator.name={estimator}", *settings))


def _warm(name: str, title: str, estimator: str, *settings: str) -> Variant:
    return Variant(name, title, (f"estimator.name={estimator}", *settings), preset="zo-ae-ds")


FORWARD = "estimator.difference=forward"
MSE = "train.mse=1.0"

VARIANTS = (
    _zo("cge-central", "CGE, central (the paper's code)", "cge", "estimator.difference=central"),
    _zo("cge", "CGE, forward (the paper)", "cge", FORWARD),
    _zo("active-cge", "active-set CGE", "active-cge", FORWARD),
    _zo("rge-q4", "RGE q = 4", "rge", "estimator.q=4", FORWARD),
    _zo("orthonormal-q4", "orthonormal q = 4, active", "orthonormal", "estimator.q=4", FORWARD, *_ACTIVE),
    _zo("antithetic-q2", "orthonormal pairs q = 2, active", "orthonormal", "estimator.q=2", *_ACTIVE),
    _zo(
        "answers-q4",
        "the same q = 4, whole answers",
        "orthonormal",
        "estimator.q=4",
        FORWARD,
        *_ACTIVE,
        "estimator.values=answers",
    ),
    _zo(
        "gauss-newton-q4",
        "the same, Gauss-Newton",
        "orthonormal",
        "estimator.q=4",
        FORWARD,
        *_ACTIVE,
        "estimator.direction=gauss-newton",
    ),
    _zo("inner-3", "active-set CGE, 3 steps a Jacobian", "active-cge", FORWARD, "train.inner_steps=3"),
    _zo("control-q2", "control variate q = 2, active", "control-variate", "estimator.q=2", FORWARD, *_ACTIVE),
    _zo("prior-q2", "prior-guided q = 2, active", "prior", "estimator.q=2", FORWARD, *_ACTIVE),
    _zo("prior-q1", "prior-guided q = 1, active", "prior", "estimator.q=1", FORWARD, *_ACTIVE),
    _zo(
        "prior-spread",
        "prior-guided q = 2, spread by the guide",
        "prior",
        "estimator.q=2",
        FORWARD,
        *_ACTIVE,
        "estimator.spread=guide",
    ),
    _zo(
        "prior-loss",
        "prior-guided q = 2, images by loss",
        "prior",
        "estimator.q=2",
        FORWARD,
        *_ACTIVE,
        "train.sampling=loss",
    ),
    _zo("prior-mse", "prior-guided q = 2, + MSE", "prior", "estimator.q=2", FORWARD, *_ACTIVE, MSE),
    _zo("distil", "distil only (no ZO estimate)", "distil", "estimator.q=0"),
    _zo("distil-mse", "distil only, + MSE", "distil", "estimator.q=0", MSE),
    _warm(
        "cge-central-warm",
        "CGE, central, warm start",
        "cge",
        "estimator.active=false",
        "estimator.difference=central",
    ),
    _warm("active-cge-warm", "active-set CGE, warm start", "active-cge"),
    _warm("prior-q2-warm", "prior-guided q = 2, warm start (zo-ae-ds)", "prior"),
    _warm("distil-warm", "distil only, warm start", "distil", "estimator.q=0", "estimator.active=false"),
    Variant("mse-ae-ds", "MSE only, no query", (), queries=False, preset="mse-ae-ds"),
    Variant("mse-ds", "MSE only, no autoencoder, no query", (), queries=False, preset="mse-ds"),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}
