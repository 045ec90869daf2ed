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
from oracle_server.key_files import key_file
from oracle_server.ledger import Ledger

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
        self._book = Ledger.open(self._ledger, create=False)

    def client(self, name: str) -> LiveOracle:
        """The oracle as a client of this name sees it: added with a budget of nothing, if it is new."""
        path = self._folder / f"{name}.key"
        if not path.exists():
            with key_file(path) as write:
                _, key = self._book.add_client(name, 0)
                write(key.reveal())
        return LiveOracle(self.url, path.read_text(encoding="utf-8").strip())

    def grant(self, name: str, budget: int) -> None:
        """Set a client's lifetime budget, in queries."""
        self._book.set_budget(name, budget)

    def stop(self) -> None:
        self._book.close()
        with suppress(OSError):
            self._child.stop()


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
