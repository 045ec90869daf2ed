"""The table as Markdown, JSON and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import matplotlib
import numpy as np

from benchmarks.measuring import table
from benchmarks.table.columns import BY_PRESET, COLUMNS, ORDERINGS, RADII
from benchmarks.table.comparing import difference
from benchmarks.table.runs import Row
from defender_client import certify

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Rows = Mapping[str, Mapping[int, Row]]
"""By preset and seed."""

Certified = Mapping[str, Mapping[int, Sequence[certify.Row]]]
"""Certified images by preset and seed."""

T = TypeVar("T")
_COLOURS = ("black", "C0", "grey", "silver", *(f"C{number}" for number in range(1, 10)))  # one for each column
_STYLES = {"zo-ds": "--", "zo-ae": "-", "fo-ds": ":", "fo-ae": "-."}


def write_table(out: Path, name: str, rows: Rows, certified: Certified, heading: str) -> str:
    """`NAME.md` and `NAME.json` in `out`; returns the Markdown."""
    text = "\n\n".join([f"```\n{heading}\n```", _accuracies(rows), _costs(rows), _orderings(certified)]) + "\n"
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    values = {preset: {seed: asdict(row) for seed, row in found.items()} for preset, found in rows.items()}
    (out / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return text


def _accuracies(rows: Rows) -> str:
    lines = []
    for preset, found in _in_order(rows):
        column = BY_PRESET[preset]
        cells = [_over(found, lambda row, i=i: row.accuracy[i]) for i in range(len(RADII))]  # type: ignore[misc]
        paper = "-" if column.paper is None else " / ".join(f"{value:.1f}" for value in column.paper)
        lines.append([column.title, *cells, _over(found, lambda row: row.abstained), paper])
    head = ["certified accuracy, %", "r = 0", *(f"{r:g}" for r in RADII[1:]), "abstained", "the paper, at full scale"]
    return table(head, lines)


def _costs(rows: Rows) -> str:
    lines = []
    for preset, found in _in_order(rows):
        some = next(iter(found.values()))
        seconds = {part: statistics.mean(row.seconds.get(part, 0.0) for row in found.values()) for part in _PARTS}
        lines.append(
            [
                BY_PRESET[preset].title,
                f"{some.samples:,}",
                f"{some.training_queries:,}",
                f"{some.other_queries:,}",
                f"{some.certification_queries:,}",
                f"{some.bytes_up / 1e6:,.1f}",
                f"{some.bytes_down / 1e6:,.1f}",
                *(f"{seconds[part]:,.0f}" for part in _PARTS),
                some.audit,
            ]
        )
    head = [
        "cost of a run",
        "samples",
        "training queries",
        "labels, noise floor, validation",
        "certification queries",
        "MB up",
        "MB down",
        *(f"{part}, s" for part in _PARTS),
        "audit",
    ]
    return table(head, lines)


_PARTS = ("pretraining", "training", "certification")


def _orderings(certified: Certified) -> str:
    lines = []
    for above, below in ORDERINGS:
        if above not in certified or below not in certified:
            continue
        for radius in RADII:
            rows = [row for seeds in (certified[above], certified[below]) for found in seeds.values() for row in found]
            if not any(row.radius >= radius for row in rows):
                continue  # nobody certifies anything there
            found = difference(certified[above], certified[below], radius)
            seeds = ", ".join(f"{100 * value:+.1f}" for value in found.by_seed)
            lines.append(
                [
                    f"{BY_PRESET[above].title} above {BY_PRESET[below].title}",
                    f"{radius:g}",
                    f"{100 * found.mean:+.1f} ± {100 * found.half:.1f}",
                    seeds,
                    found.verdict,
                ]
            )
    head = ["ordering", "r", "difference, points (95 % over images)", "by seed", ""]
    return table(head, lines) if lines else "No two columns to compare yet."


def curves(rows: Certified, path: Path, limit: float, title: str) -> None:
    """Certified accuracy of all columns against the radius, means over seeds with their range."""
    figure, axes = plt.subplots(figsize=(8.0, 4.8), layout="constrained")
    radii = np.linspace(0, limit, 300)
    for preset, found in _in_order(rows):
        number = list(BY_PRESET).index(preset)
        each = np.array([[certify.certified_accuracy(list(r), float(x)) for x in radii] for r in found.values()])
        style = next((style for start, style in _STYLES.items() if preset.startswith(start)), "-")
        (line,) = axes.plot(radii, each.mean(axis=0), style, label=BY_PRESET[preset].title, color=_COLOURS[number])
        if len(each) > 1:
            axes.fill_between(radii, each.min(axis=0), each.max(axis=0), color=line.get_color(), alpha=0.15, lw=0)
    axes.set(xlabel="l2 radius", ylabel="certified accuracy", ylim=(0, 1), xlim=(0, limit), title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bars(rows: Rows, path: Path, queries: int) -> None:
    """Accuracy at equal queries, a bar a column and radius, with the range over the seeds."""
    shown = _in_order(rows)
    figure, axes = plt.subplots(figsize=(8.0, 4.4), layout="constrained")
    radii = [i for i in range(len(RADII)) if all(r.accuracy[i] is not None for _, f in shown for r in f.values())]
    width = 0.8 / len(radii)
    for place, i in enumerate(radii):
        values = [[100 * (row.accuracy[i] or 0.0) for row in found.values()] for _, found in shown]
        means = [statistics.mean(value) for value in values]
        low = [mean - min(value) for mean, value in zip(means, values, strict=True)]
        high = [max(value) - mean for mean, value in zip(means, values, strict=True)]
        positions = np.arange(len(shown)) + (place - (len(radii) - 1) / 2) * width
        axes.bar(positions, means, width, yerr=[low, high], capsize=2, label=f"r = {RADII[i]:g}")
    names = [BY_PRESET[preset].title.replace(", ", "\n") for preset, _ in shown]
    axes.set_xticks(range(len(shown)), names, fontsize=8)
    axes.set(ylabel="certified accuracy, %", title=f"{queries:,} training queries each")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _over(found: Mapping[int, Row], value: Callable[[Row], float | None]) -> str:
    """A figure in %, of several seeds the mean and the range."""
    values = [value(row) for row in found.values()]
    known = [100 * v for v in values if v is not None]
    if len(known) < len(values):
        return "-"
    if len(known) == 1:
        return f"{known[0]:.1f}"
    return f"{statistics.mean(known):.1f} ({min(known):.1f} to {max(known):.1f})"


def _in_order(rows: Mapping[str, T]) -> list[tuple[str, T]]:
    return [(column.preset, rows[column.preset]) for column in COLUMNS if column.preset in rows]
