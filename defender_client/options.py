"""What the commands' options mean: a configuration, an oracle or a recording, a white box."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defender_client import config as configs
from defender_client.config import ConfigError, RunConfig
from defender_client.sources import LiveOracle, LiveSource, RecordedRun, source_of
from defender_client.terminal import KEY_VARIABLE, URL_VARIABLE
from defender_client.whitebox import WhiteBoxSource


def config_of(preset: str, dataset: str | None, settings: list[str] | None, scale: str) -> RunConfig:
    """The configuration of a preset, a scale, and the values that were set."""
    chosen = [f"data.dataset={json.dumps(dataset)}"] if dataset else []
    return configs.load_preset(preset, [*chosen, *(settings or [])], scale)


def whitebox_of(weights: Path | None, model: str | None) -> WhiteBoxSource | None:
    """The classifier that the user holds, if one is named."""
    if weights is None and model is not None:
        raise ConfigError("--whitebox-model names the architecture of --whitebox FILE, which is missing")
    return None if weights is None else WhiteBoxSource(weights, model)


def api_key() -> str | None:
    """The key, from the environment: never from the command line, which others see."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    file = os.environ.get(f"{KEY_VARIABLE}_FILE")
    if not key and file:
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", "it is not text")
            raise ConfigError(f"{KEY_VARIABLE}_FILE={file} cannot be read: {why}") from None
    return key or None


def live(url: str, ca: Path | None) -> LiveOracle:
    """An oracle of ours."""
    return LiveOracle(url, api_key(), ca)


@dataclass(frozen=True)
class Foreign:
    """The options of an oracle that is not ours."""

    budget: int | None
    changes: Mapping[str, Any]
    key_file: Path | None = None

    def source(self, oracle: str, ca: Path | None, record: bool = False) -> LiveSource:
        """The oracle that `--oracle` names, ours or not."""
        return source_of(
            oracle,
            api_key(),
            ca,
            record=record,
            budget=self.budget,
            changes=self.changes,
            key_file=self.key_file,
        )


def described_by(input_name: str | None, output_name: str | None, settings: list[str] | None) -> dict[str, Any]:
    """What changes in the description of an oracle that is not ours."""
    named = {"input": input_name, "output": output_name}
    given = {name: value for name, value in named.items() if value is not None}
    return configs.parse_settings(settings or (), "--endpoint") | given


def source_from(
    url: str | None,
    typed: bool,
    ca: Path | None,
    record: bool,
    replay: Path | None,
    foreign: Foreign,
) -> LiveSource | RecordedRun:
    """The oracle or the recording that a command names; ConfigError unless it names one of them.

    `typed` says that the address stands on the command line, and not only in the environment.
    """
    if replay is None:
        if url is None:
            raise ConfigError(f"name an oracle by --oracle URL (or {URL_VARIABLE}), or a recorded run by --replay RUN")
        return foreign.source(url, ca, record)
    # An address that only the environment names is there for other commands.
    if url is not None and typed:
        raise ConfigError("--oracle and --replay exclude each other: a replay asks no oracle")
    if record:
        raise ConfigError("--record and --replay exclude each other: a replay's answers are on record already")
    if foreign.budget is not None or foreign.changes:
        raise ConfigError("--budget and --endpoint are for an oracle that is asked: a replay asks none")
    return RecordedRun(replay)
