"""The oracles of a table: real servers on loopback, each with its ledger and a client for each run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import ROOT, Child, Failed
from defender_client.sources import LiveOracle

_START_S = 180.0


@dataclass(frozen=True)
class Hidden:
    """What an oracle hides: the model's name, and its weights file (None: those that are shipped)."""

    model: str
    weights: Path | None


class TableOracle:
    """An `oracle-server serve` that runs until `stop`; its ledger and its clients' keys stay in `folder`.

    Raises:
        Failed: it did not start.
    """

    def __init__(self, folder: Path, hidden: Hidden, options: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ledger = f"sqlite:///{folder / 'ledger.db'}"
        weights = [] if hidden.weights is None else ["--weights", str(hidden.weights)]
        command = [sys.executable, "-m", "oracle_server", "serve", "--model", hidden.model, *weights, "--port", "0"]
        self._child = Child([*command, "--ledger", self._ledger, "--allow-decoders", *options])
        try:
            line = self._child.line(_START_S)
            if not line.startswith("listening on "):
                raise Failed(line)
        except BaseException:
            self._child.stop()
            raise
        self.url = line.removeprefix("listening on ").strip()

    def client(self, name: str) -> LiveOracle:
        """The oracle as a client of this name sees it: added with a budget of nothing, if it is new."""
        key_file = self._folder / f"{name}.key"
        self._run("clients", "add", name, "--budget", "0", "--key-file", str(key_file), "--exist-ok")
        return LiveOracle(self.url, key_file.read_text(encoding="utf-8").strip())

    def grant(self, name: str, budget: int) -> None:
        """Set a client's lifetime budget, in queries."""
        self._run("clients", "set-budget", name, str(budget))

    def stop(self) -> None:
        with suppress(OSError):
            self._child.stop()

    def _run(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "oracle_server", *arguments, "--ledger", self._ledger]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode:
            raise Failed(f"oracle-server {' '.join(arguments)}: {done.stderr.strip()}")


def retrain(hidden: Hidden, out: Path, options: Sequence[str]) -> None:
    """RS: the classifier retrained with Gaussian noise, by `oracle-server train-classifier`; nothing if `out` is there.

    Raises:
        Failed: it ended with an error.
    """
    if out.exists():
        return
    weights = [] if hidden.weights is None else ["--weights", str(hidden.weights)]
    command = [sys.executable, "-m", "oracle_server", "train-classifier", "--model", hidden.model, *weights]
    done = subprocess.run([*command, "--out", str(out), *options], check=False, cwd=ROOT)
    if done.returncode:
        raise Failed(f"train-classifier ended with exit code {done.returncode}")
