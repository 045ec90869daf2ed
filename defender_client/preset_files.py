"""The presets that are shipped, by name: found and described without building any."""

from __future__ import annotations

import tomllib
from importlib import resources

_FOLDER = resources.files("defender_client") / "presets"


def preset_names() -> list[str]:
    """Their names, in order."""
    return sorted(entry.name.removesuffix(".toml") for entry in _FOLDER.iterdir() if entry.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """The TOML of the preset of this name."""
    return (_FOLDER / f"{name}.toml").read_text(encoding="utf-8")


def described_presets() -> dict[str, str]:
    """What each of them says that it is."""
    return {name: str(tomllib.loads(preset_text(name))["description"]) for name in preset_names()}
