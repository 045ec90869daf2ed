"""The report of one or more runs: one HTML file with its pictures inside, and the same pictures as PNGs beside it.

Everything is drawn from what the runs left on disk: certified.tsv, queries.jsonl, training.jsonl, the stacks. Nothing
is asked of the oracle.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from defender_client import attack, certify, noise_floor
from defender_client import config as configs
from defender_client import stack as stacks
from defender_client.certify import Row
from defender_client.config import CertifyConfig, ConfigError, RunConfig
from defender_client.data import gaussian, load_test
from defender_client.noise_floor import Finding
from defender_client.objective import RECONSTRUCTION, STABILITY
from defender_client.query_log import QueryLog, log_files
from defender_client.stack import Stack
from defender_client.train import CURVE_FILE, STACK_FILE
from shared.datasets import ImageSet
from shared.version import VERSION

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

RADII = (0.0, 0.25, 0.5, 0.75)
_PICTURED_IMAGES = 8
_AFTER_TRAINING = (certify.PURPOSE, attack.PURPOSE)
_QUALITIES = (STABILITY.quality_name, RECONSTRUCTION.quality_name)


@dataclass(frozen=True)
class Result:
    """One run as its directory tells it.

    Attributes:
        rows: certified images.
        queries: queries that the run spent, by purpose.
        replayed: answers that it took from a recording instead, in rows.
        curve: one line per validation.
        noise: what was measured before the first step; None where nothing was.
    """

    name: str
    config: RunConfig
    certification: CertifyConfig
    rows: list[Row]
    queries: dict[str, int]
    replayed: int
    bytes_up: int
    bytes_down: int
    curve: list[dict[str, Any]]
    noise: Finding | None
    stack: Stack | None

    @property
    def queries_per_image(self) -> float | None:
        """What an image's certificate cost, on average, whoever paid; None where there is none."""
        if not self.rows:
            return None
        if self.certification.method == "fixed":
            return self.certification.n0 + self.certification.n
        return sum(row.queries or 0 for row in self.rows) / len(self.rows)

    @property
    def table_row(self) -> dict[str, Any]:
        """The numbers of the report's table; accuracies in 0..1."""
        limit = certify.limit(self.certification, self.config.sigma)
        return {
            "name": self.name,
            "preset": self.config.preset,
            "sigma": self.config.sigma,
            "images": len(self.rows),
            "n": self.certification.n,
            "method": self.certification.method,
            "queries_per_image": self.queries_per_image,
            # A radius that n draws cannot reach, or that was not aimed at, is not an accuracy of 0.
            "accuracy": [certify.certified_accuracy(self.rows, r) if self.rows and r <= limit else None for r in RADII],
            "abstained": sum(row.predict == -1 for row in self.rows) / len(self.rows) if self.rows else None,
            "mean_radius": sum(row.radius * row.correct for row in self.rows) / len(self.rows) if self.rows else None,
            "training_queries": sum(v for purpose, v in self.queries.items() if purpose not in _AFTER_TRAINING),
            "certification_queries": self.queries.get(certify.PURPOSE, 0),
        }


def read_run(run: Path) -> Result:
    """A run's results; ConfigError if `run` is not a run directory."""
    config = configs.load(run)
    log = QueryLog.of_run(run) if log_files(run) else QueryLog(None)
    curve_path = run / CURVE_FILE
    curve: dict[int, dict[str, Any]] = {}
    if curve_path.exists():
        for line in curve_path.read_text(encoding="utf-8").splitlines():
            try:
                point = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            curve[point["step"]] = point  # an epoch validated again after a kill replaces itself
    return Result(
        name=run.resolve().name,  # also of "."
        config=config,
        certification=configs.certify_settings(config, run, {}),
        rows=certify.read(run / certify.CERTIFIED_FILE),
        queries=dict(log.charged),
        replayed=log.replayed_rows,
        bytes_up=sum(request.bytes_up for request in log.requests.values()),
        bytes_down=sum(request.bytes_down for request in log.requests.values()),
        curve=[curve[step] for step in sorted(curve)],
        noise=noise_floor.read(run).finding,
        stack=stacks.load(run / STACK_FILE) if (run / STACK_FILE).exists() else None,
    )


def report(runs: Sequence[Path], target: Path, data: Path | None) -> None:
    """Write `target` (HTML) and PNGs beside it.

    Args:
        runs: run directories, in the order they are shown.
        target: the HTML file.
        data: directory of the data set's files, for the pictures of denoised images.

    Raises:
        ConfigError: a directory that is not a run.
        DatasetError: the images cannot be loaded.
    """
    results = [read_run(run) for run in runs]
    names = [result.name for result in results]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"two runs share a name ({', '.join(names)}): the report tells runs apart by their directory's"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    figures = {"certified-accuracy": certified_accuracy_figure(results)}
    if any(result.curve for result in results):
        figures["training"] = training_figure(results)
    defended = [result for result in results if result.stack is not None and result.stack.denoiser is not None]
    for result in defended:
        test = load_test(result.config.data, data)
        figures[f"images-{result.name}"] = images_figure(result, test)
    pictures = {}
    for name, figure in figures.items():
        path = target.parent / f"{name}.png"
        figure.savefig(path, dpi=120)
        plt.close(figure)
        pictures[name] = base64.b64encode(path.read_bytes()).decode()
    template = (resources.files("defender_client") / "templates" / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = environment.from_string(template).render(
        rows=[result.table_row for result in results],
        results=results,
        radii=RADII,
        pictures=pictures,
        version=VERSION,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    target.write_text(html, encoding="utf-8")


def markdown_table(results: Sequence[Result]) -> str:
    """The report's table as Markdown, accuracies in %."""
    head = "| run | " + " | ".join(f"r = {r:g}" for r in RADII) + " | abstained | training queries | certification |\n"
    lines = [head, "|" + "---|" * (len(RADII) + 4) + "\n"]
    for result in results:
        row = result.table_row
        cells = ["-" if a is None else f"{100 * a:.1f}" for a in [*row["accuracy"], row["abstained"]]]
        spent = [f"{row['training_queries']:,}", f"{row['certification_queries']:,}"]
        lines.append(f"| {row['name']} | " + " | ".join([*cells, *spent]) + " |\n")
    return "".join(lines)


def certified_accuracy_figure(results: Sequence[Result]) -> Figure:
    """Certified accuracy against l2 radius, one curve a run, drawn as far as its certification says anything."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for result in results:
        if not result.rows:
            continue
        limit = certify.limit(result.certification, result.config.sigma)
        radii = np.linspace(0, limit, 400)
        accuracy = [certify.certified_accuracy(result.rows, float(r)) for r in radii]
        label = f"{result.name} (n = {result.certification.n:,}, {len(result.rows)} images)"
        if result.certification.method == "fixed":  # nothing is certified beyond; a sequential one did not ask
            radii, accuracy = np.append(radii, limit), [*accuracy, 0.0]
        else:
            label = label.replace("n =", "sequential, n <=")
        axes.plot(radii, accuracy, label=label)
    axes.set(xlabel="l2 radius", ylabel="certified accuracy", ylim=(0, 1), xlim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    return figure


def training_figure(results: Sequence[Result]) -> Figure:
    """Agreement with the oracle on noisy validation images against queries spent."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for result in results:
        if result.curve:
            axes.plot(
                [point["queries"] for point in result.curve],
                [next(point[name] for name in _QUALITIES if name in point) for point in result.curve],
                marker=".",
                label=result.name,
            )
    names = {name for result in results for name in _QUALITIES if result.curve and name in result.curve[0]}
    axes.set(xlabel="queries spent", ylabel=f"validation {' or '.join(sorted(names))}")
    if names == {STABILITY.quality_name}:
        axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


@torch.no_grad()
def images_figure(result: Result, test: ImageSet) -> Figure:
    """Rows: image, noisy image, denoised image, what the oracle is asked about; the first images of the test set."""
    stack = result.stack
    if stack is None:
        raise ConfigError(f"run {result.name} has no stack to show")
    count = min(_PICTURED_IMAGES, len(test))
    clean = test.floats(slice(0, count))
    noisy = gaussian(clean, result.config.sigma, torch.Generator().manual_seed(result.config.seed))
    rows = {"image": clean, f"+ noise, sigma {result.config.sigma:g}": noisy, "denoised": stack.denoise(noisy)}
    if stack.autoencoder is not None:
        rows["decoded: what is asked"] = stack(noisy)
    figure, axes = plt.subplots(
        len(rows), count, figsize=(1.1 * count, 1.25 * len(rows)), squeeze=False, layout="constrained"
    )
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        for panel, image in zip(line, images, strict=True):
            panel.imshow(_displayable(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            panel.set_axis_off()
        line[0].set_title(title, loc="left", fontsize=9)
    return figure


def _displayable(image: torch.Tensor) -> NDArray[np.float32]:
    """[c, h, w] as what matplotlib shows: [h, w] for one channel, [h, w, 3] for colour."""
    array: NDArray[np.float32] = image.clamp(0, 1).permute(1, 2, 0).numpy()
    return array[:, :, 0] if array.shape[2] == 1 else array
