"""`--scale smoke|cpu|full`: one switch for epochs, images and network widths, declared in `scales.toml`.

A scale is a list of rules, each of which changes the values of the presets and data sets that it names. They apply in
order, after the preset and before `--set`. `full` is the paper's recipe, but for what an image of another size needs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any

from pydantic import BaseModel, ConfigDict

from defender_client.errors import ConfigError

FULL = "full"


class _Rule(BaseModel):
    """`set` holds sections of a preset; `datasets` and `presets` are names or patterns such as `zo-ae-ds-*`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    datasets: tuple[str, ...] = ("*",)
    presets: tuple[str, ...] = ("*",)
    set: dict[str, Any]

    def holds(self, preset: str, dataset: str) -> bool:
        return _any(self.presets, preset) and _any(self.datasets, dataset)


def names() -> tuple[str, ...]:
    """The scales, smallest first."""
    return tuple(_scales())


def changes_of(scale: str, preset: str, dataset: str) -> list[dict[str, Any]]:
    """What a scale changes in a preset's values, in the order in which it applies.

    Raises:
        ConfigError: no scale has this name, or it says nothing of this preset.
    """
    if scale not in names():
        raise ConfigError(f"no scale is called '{scale}': choose one of {', '.join(names())}")
    changes = [rule.set for rule in _scales()[scale] if rule.holds(preset, dataset)]
    if not changes and scale != FULL:
        raise ConfigError(f"preset '{preset}' has one size: leave out --scale {scale}")
    return changes


def merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put `changes` into `values`, section by section; what they do not name stays."""
    for key, change in changes.items():
        if isinstance(change, Mapping) and isinstance(values.get(key), dict):
            merge(values[key], change)
        elif isinstance(change, Mapping):
            values[key] = {}
            merge(values[key], change)
        else:
            values[key] = change


def _any(patterns: tuple[str, ...], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@cache
def _scales() -> dict[str, list[_Rule]]:
    text = (resources.files("defender_client") / "scales.toml").read_text(encoding="utf-8")
    return {scale: [_Rule.model_validate(rule) for rule in rules] for scale, rules in tomllib.loads(text).items()}
