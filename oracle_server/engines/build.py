"""The engine that the settings ask for: built, measured or remembered, and said so in the log."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from oracle_server.cpus import usable_cpus
from oracle_server.engines import cache
from oracle_server.engines.blocks import BlockEngine
from oracle_server.engines.candidate import NotACandidate
from oracle_server.engines.choice import Chosen, choose
from oracle_server.engines.crew import Crew, default_crew, device_crew
from oracle_server.engines.eager import EXACT, Arithmetic, eager
from oracle_server.engines.engine import Compute, Engine
from oracle_server.engines.fused import fused
from oracle_server.engines.ladder import VaryingAnswers
from oracle_server.engines.onnx import onnxruntime
from oracle_server.loading import Classifier, Reconstructor
from oracle_server.settings import Settings
from shared.models.weight_files import ModelError

log = logging.getLogger(__name__)
_MOST_ON = {"cpu": 256, "cuda": 1024}  # rows of the largest block that is tried


@dataclass(frozen=True)
class _Plan:
    """What is to be built, with what, and where it may have been measured before."""

    device: torch.device
    team: Crew
    makers: dict[str, Callable[[], Compute]]
    folder: Path | None
    key: str


def build_engine(model: Classifier | Reconstructor, settings: Settings) -> Engine:
    """The engine that the settings ask for.

    Raises:
        ModelError: the device is not there, or the engine asked for cannot compute this model here.
    """
    plan = _plan(model, settings)
    known = _known(plan)
    if known is not None:
        return known
    with cache.alone(plan.folder):
        # Once more: another server may have measured it while this one waited.
        return _known(plan) or _measured(plan, model, settings)


def _known(plan: _Plan) -> Engine | None:
    """The engine that an earlier start chose, if it did and it can be built."""
    known = cache.load(plan.folder, plan.key)
    if known is None or known.engine not in plan.makers:
        return None
    try:
        engine = BlockEngine(known.engine, plan.makers[known.engine](), known.ladder, plan.team)
    except NotACandidate as error:
        log.info("engine %s, chosen at an earlier start, is gone: %s", known.engine, error)
        return None
    log.info("%s; measured at an earlier start", _said(known, plan.team))
    return engine


def _measured(plan: _Plan, model: Classifier | Reconstructor, settings: Settings) -> Engine:
    """The engine that is chosen now, and remembered."""
    began = time.perf_counter()
    chosen = _choose(model, settings, plan)
    engine = chosen.engine
    measured = cache.Measured(
        engine=engine.name,
        sizes=engine.ladder.sizes,
        rate=engine.ladder.rate,
        shape=engine.ladder.shape,
        spread=engine.ladder.spread,
        rates=chosen.rates,
        difference=chosen.difference,
    )
    cache.save(plan.folder, plan.key, measured)
    log.info("%s; measured in %.1f s", _said(measured, plan.team), time.perf_counter() - began)
    return engine


def known_engine(model: Classifier | Reconstructor, settings: Settings) -> str | None:
    """The engine that an earlier start chose; None where none did. Raises `ModelError` as `build_engine` does."""
    plan = _plan(model, settings)
    known = cache.load(plan.folder, plan.key)
    return None if known is None or known.engine not in plan.makers else known.engine


def _plan(model: Classifier | Reconstructor, settings: Settings) -> _Plan:
    torch.set_num_threads(usable_cpus())
    device = _device(settings, _bound(model))
    team = device_crew() if device.type == "cuda" else default_crew()
    return _Plan(
        device=device,
        team=team,
        makers=_makers(model, settings, Arithmetic(device, _dtype(settings))),
        folder=cache.folder_of(settings) if _remembered(model) else None,
        key=cache.key_of(model.module, model.image_shape, settings, device, team.threads),
    )


def _makers(
    model: Classifier | Reconstructor, settings: Settings, arithmetic: Arithmetic
) -> dict[str, Callable[[], Compute]]:
    """How to make each engine that the settings allow, the plainest first."""
    module = model.module
    bound = _bound(model)
    if bound is not None:
        if settings.engine not in ("auto", bound):
            raise ModelError(f"--engine {settings.engine}: this model is a program that only {bound} can compute")
        return {bound: functools.partial(eager, module, arithmetic)}
    makers: dict[str, Callable[[], Compute]] = {
        "eager": functools.partial(eager, module, arithmetic),
        "compile": functools.partial(fused, module, arithmetic),
    }
    if arithmetic == EXACT:
        patient = settings.engine == "onnxruntime"
        makers["onnxruntime"] = functools.partial(onnxruntime, module, model.image_shape, patient=patient)
    elif settings.engine == "onnxruntime":
        raise ModelError("--engine onnxruntime computes float32 on the CPU: leave out --precision and --device cuda")
    if settings.engine == "auto":
        return makers
    return {name: make for name, make in makers.items() if name in ("eager", settings.engine)}


def _bound(model: Classifier | Reconstructor) -> str | None:
    """The one engine that can compute the model; None where any may."""
    return model.bound if isinstance(model, Classifier) else None


def _remembered(model: Classifier | Reconstructor) -> bool:
    """Whether what is measured of the model may be kept for the next start."""
    return model.remembered if isinstance(model, Classifier) else True


def _choose(model: Classifier | Reconstructor, settings: Settings, plan: _Plan) -> Chosen:
    wanted = None if settings.engine == "auto" else settings.engine
    most = settings.engine_block or _MOST_ON[plan.device.type]
    try:
        return choose(plan.makers, model.image_shape, plan.team, most, wanted)
    except NotACandidate as error:
        raise ModelError(f"--engine {settings.engine}: {error}") from error
    except VaryingAnswers as error:
        raise ModelError(f"this model cannot be served: {error}") from error


def _said(measured: cache.Measured, team: Crew) -> str:
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in measured.rates.items())
    return (
        f"engine {measured.engine}: images/s {rates}; answers within {measured.difference:.1e} of eager; "
        f"{team.threads} thread(s), blocks of {', '.join(map(str, measured.sizes))} rows, which agree bit for bit "
        f"(any sizes: within {measured.spread:.1e})"
    )


def _dtype(settings: Settings) -> torch.dtype:
    if settings.precision == "bfloat16":
        log.warning(
            "--precision bfloat16 keeps 8 of float32's 24 significant bits: finite differences of the answers, which "
            "zeroth-order training lives on, lose their digits"
        )
        return torch.bfloat16
    return torch.float32


def _device(settings: Settings, bound: str | None) -> torch.device:
    name = settings.device
    if bound == "onnxruntime":
        if name == "cuda" or settings.precision != "float32":
            raise ModelError("an ONNX file is computed in float32 on the CPU: leave out --precision and --device cuda")
        name = "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: this machine has no CUDA device that torch can use")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        # TF32 keeps 10 of float32's 23 bits, and finite differences of the answers live in the others.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32
        # The algorithm for a shape is the same one each time, in each process.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        if settings.tf32:
            log.warning("--tf32 keeps 10 of float32's 23 bits: finite differences of the answers lose their digits")
    elif settings.tf32:
        raise ModelError("--tf32 is CUDA's: the CPU has no such arithmetic")
    return torch.device(name)
