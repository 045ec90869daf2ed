"""Where the commands print, and the variables that they read; light, so that `--help` and completion are quick."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rich.console import Console

KEY_VARIABLE = "ORACLE_API_KEY"
URL_VARIABLE = "ORACLE_URL"

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def speaker(environment: Mapping[str, str] | None = None) -> str:
    """What this process is called before its messages: "rank 1: " where torchrun started several, else nothing."""
    environment = os.environ if environment is None else environment
    return f"rank {environment.get('RANK', '?')}: " if environment.get("WORLD_SIZE", "1") != "1" else ""
