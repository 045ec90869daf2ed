"""Which exit code an error has, and what is said of it: here and nowhere else."""

from __future__ import annotations

from defender_client.checkpoints import CheckpointError
from defender_client.config import ConfigError
from defender_client.demo import DemoFailed
from defender_client.plan import PlanUnaffordable
from defender_client.query_log import LogDamaged
from defender_client.ranks import RankStopped
from defender_client.recording import RecordingError
from shared.datasets import DatasetError
from shared.models.weight_files import ModelError
from shared.wire.errors import BudgetExhausted, OracleError


def exit_of(error: Exception) -> tuple[int, str] | None:
    """The exit code and one line for what a user can mend; None for what we must."""
    match error:
        case DemoFailed():
            return 1, f"demo failed: {error}"
        case ConfigError() | DatasetError() | CheckpointError() | LogDamaged() | RecordingError() | OSError():
            return 2, f"error: {error}"
        case ModelError():
            return 2, f"error: {error}"
        case PlanUnaffordable() | BudgetExhausted():
            return 3, f"budget: {error}"
        case OracleError():
            return 4, f"oracle: {error.title}: {error.detail}"
        case RankStopped():
            return 5, f"{error}; the same command resumes it"
        case _:
            return None
