"""The defender: learns a defence in front of a classifier from its answers alone, and certifies it.

What other programs import stands here (docs/library.md). Each name is loaded when it is first used: importing the
package costs nothing, and torch comes with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from defender_client.adapters.art import art_classifier
    from defender_client.adapters.counted import Counted
    from defender_client.adapters.foolbox import foolbox_model
    from defender_client.adapters.torch import NoGradients, OracleModule
    from defender_client.callables import Defended, Smoothed, predicted
    from defender_client.config import ConfigError, RunConfig, load_preset
    from defender_client.export import export_stack
    from defender_client.jobs import attack_job, certify_job, train_job
    from defender_client.oracle_client import OracleUnreachable, RemoteOracle
    from defender_client.smoothing import ABSTAIN, Certificate, Smooth
    from defender_client.sources import LiveOracle
    from defender_client.stack import Stack
    from defender_client.stack import load as load_stack
    from defender_client.whitebox import WhiteBoxSource
    from defender_client.zo import Estimator
    from defender_client.zo import make as make_estimator
    from shared.models.manifest import Manifest, load_exported
    from shared.wire.errors import BudgetExhausted, OracleError

__all__ = [
    "ABSTAIN",
    "BudgetExhausted",
    "Certificate",
    "ConfigError",
    "Counted",
    "Defended",
    "Estimator",
    "LiveOracle",
    "Manifest",
    "NoGradients",
    "OracleError",
    "OracleModule",
    "OracleUnreachable",
    "RemoteOracle",
    "RunConfig",
    "Smooth",
    "Smoothed",
    "Stack",
    "WhiteBoxSource",
    "art_classifier",
    "attack_job",
    "certify_job",
    "export_stack",
    "foolbox_model",
    "load_exported",
    "load_preset",
    "load_stack",
    "make_estimator",
    "predicted",
    "train_job",
]

# Where each name is: a module, and the name there where it is another.
_HOMES = {
    "ABSTAIN": "defender_client.smoothing",
    "BudgetExhausted": "shared.wire.errors",
    "Certificate": "defender_client.smoothing",
    "ConfigError": "defender_client.errors",
    "Counted": "defender_client.adapters.counted",
    "Defended": "defender_client.callables",
    "Estimator": "defender_client.zo",
    "LiveOracle": "defender_client.sources",
    "Manifest": "shared.models.manifest",
    "NoGradients": "defender_client.adapters.torch",
    "OracleError": "shared.wire.errors",
    "OracleModule": "defender_client.adapters.torch",
    "OracleUnreachable": "defender_client.oracle_client",
    "RemoteOracle": "defender_client.oracle_client",
    "RunConfig": "defender_client.config",
    "Smooth": "defender_client.smoothing",
    "Smoothed": "defender_client.callables",
    "Stack": "defender_client.stack",
    "WhiteBoxSource": "defender_client.whitebox",
    "art_classifier": "defender_client.adapters.art",
    "attack_job": "defender_client.jobs",
    "certify_job": "defender_client.jobs",
    "export_stack": "defender_client.export",
    "foolbox_model": "defender_client.adapters.foolbox",
    "load_exported": "shared.models.manifest",
    "load_preset": "defender_client.config",
    "load_stack": "defender_client.stack:load",
    "make_estimator": "defender_client.zo:make",
    "predicted": "defender_client.callables",
    "train_job": "defender_client.jobs",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = home.partition(":")
    value = getattr(import_module(module), there or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
