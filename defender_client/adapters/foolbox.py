"""An oracle as a Foolbox model: its decision-based and score-based attacks ask over the wire.

asked = Counted(RemoteOracle(url, key))
BoundaryAttack(steps=500).run(foolbox_model(asked), images, Misclassification(labels))
asked.queries
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor

from defender_client.adapters.counted import counted
from defender_client.adapters.torch import OracleModule
from defender_client.callables import AnyOracle
from defender_client.config import ConfigError

if TYPE_CHECKING:
    from foolbox.models.base import Model


def foolbox_model(oracle: AnyOracle) -> Model:
    """Foolbox's model for an oracle: images [n, c, h, w] in [0, 1] (its `bounds`), in batches that it takes.

    It reads torch tensors and numpy arrays, bare or in eagerpy, and answers in kind. An attack that asks torch for
    gradients ends with `adapters.torch.NoGradients`.

    Args:
        oracle: any, or `Counted`, whose `queries` tell what an attack cost.

    Raises:
        ConfigError: Foolbox is not installed, or the oracle does not say its shapes (see `Counted`).
    """
    try:
        eagerpy: Any = import_module("eagerpy")  # it does not say what it exports
        from foolbox.models.base import Model
        from foolbox.types import Bounds
    except ImportError:
        raise ConfigError("Foolbox is not installed: pip install 'zo-defense[foolbox]'") from None
    asked = counted(oracle)
    module = OracleModule(asked)

    class OracleModel(Model):  # type: ignore[misc, unused-ignore]  # any class where Foolbox is missing
        @property
        def bounds(self) -> Any:
            return Bounds(0.0, 1.0)

        @property
        def data_format(self) -> str:
            return "channels_first"

        def __call__(self, inputs: Any) -> Any:
            images, restore = eagerpy.astensor_(inputs)
            raw = images.raw
            # Through the module, so that whoever wants a gradient is told that there is none.
            return restore(eagerpy.astensor(module(raw) if isinstance(raw, Tensor) else asked(raw)))

    return OracleModel()
