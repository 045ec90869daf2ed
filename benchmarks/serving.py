"""Our own server for a benchmark: the real command, on a ledger of its own, with one client.

    python -m benchmarks.serving serve ...

is `oracle-server serve ...`, except that what it serves is a `linear` of `benchmarks.models`, which is none of the
oracle's architectures.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import ROOT, Child, Failed

_START_S = 180.0


@dataclass(frozen=True)
class OurServer:
    """A server that runs."""

    child: Child
    url: str
    key: str

    def metric(self, name: str) -> float:
        """A metric's value now, summed over its series."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def seconds(self) -> dict[str, float]:
        """CPU seconds of the server, and seconds its requests and its engine took, until now."""
        return {
            "server CPU": self.child.cpu(),
            "inference": self.metric("oracle_inference_seconds_sum"),
            "requests": self.metric("oracle_request_duration_seconds_sum"),
        }


def choices_in(folder: Path) -> dict[str, str]:
    """The environment in which an engine that is chosen by measuring is remembered in `folder`, and nowhere else.

    A choice that was made at another time, on a busy machine perhaps, then plays no part; and whoever starts after the
    server has its engine.
    """
    return {"XDG_CACHE_HOME": str(folder / "cache")}


def start(folder: Path, weights: Path, options: Sequence[str] = (), *, choices: Path | None = None) -> OurServer:
    """Serve a file of `models.write` with a new ledger in `folder`; the caller stops the child.

    Engines are chosen in `choices` (see `choices_in`), by default in `folder`.

    Raises:
        Failed: it did not start.
    """
    from benchmarks.models import LINEAR, name_of

    model = name_of(weights)
    ledger = ["--ledger", str(folder / "ledger.db")]
    added = subprocess.run(
        [sys.executable, "-m", "oracle_server", "clients", "add", "benchmark", "--budget", str(10**12), *ledger],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    if model == LINEAR:
        program, named = "benchmarks.serving", ["--weights", str(weights)]
    else:
        program, named = "oracle_server", ["--model", model, "--weights", str(weights)]
    command = [sys.executable, "-m", program, "serve", "--port", "0", *ledger, *named, *options]
    child = Child(command, choices_in(choices or folder))
    try:
        line = child.line(_START_S)
        if not line.startswith("listening on "):
            raise Failed(line)
    except BaseException:
        child.stop()
        raise
    return OurServer(child, line.removeprefix("listening on ").strip(), added.stdout.strip())


def await_answer(url: str, child: Child, patience: float = _START_S) -> None:
    """Wait until a GET of `url` is answered with 200. Raises `Failed` if the process ends or the time does."""
    deadline = time.monotonic() + patience
    while child.alive:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
                what = f"{url} answers {answer.status}"
        except (urllib.error.URLError, OSError) as error:
            what = f"{url}: {error}"
        if time.monotonic() > deadline:
            raise Failed(f"not ready within {patience:.0f} s ({what}); last it said: {child.reason()}")
        time.sleep(0.2)
    raise Failed(child.reason())


def _main() -> None:
    from shared.process import prepare

    prepare()
    from oracle_server import cli, oracle
    from oracle_server.loading import Classifier
    from oracle_server.settings import Settings

    def load_model(settings: Settings) -> Classifier:
        from benchmarks import models

        assert settings.weights is not None
        return Classifier(models.load(Path(settings.weights)), models.IMAGE_SHAPE, models.CLASSES)

    vars(oracle)["load_model"] = load_model
    cli.app()


if __name__ == "__main__":
    _main()
