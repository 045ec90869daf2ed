"""The frontier as Markdown, JSON and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib

from benchmarks.frontier.quality import Quality
from benchmarks.frontier.variants import BY_NAME, VARIANTS
from benchmarks.measuring import table
from benchmarks.table.columns import RADII
from benchmarks.table.runs import Row

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

Rows = Mapping[str, Mapping[int, Mapping[int, Row]]]
"""By variant, budget and seed."""

_SHOWN = 3  # radii in the picture, and in the comparison
_REFERENCE = "cge-central"
_STYLES = ("-", "--", ":")  # one for ten colours


def write(out: Path, rows: Rows, qualities: Sequence[Quality], heading: str) -> None:
    """`frontier.md`, `frontier.json` and `frontier.png` in `out`."""
    parts = [f"```\n{heading}\n```", _accuracies(rows), _as_good(rows), _qualities(qualities)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (out / "frontier.md").write_text(text, encoding="utf-8")
    values = {
        "rows": {
            name: {budget: {seed: asdict(row) for seed, row in seeds.items()} for budget, seeds in budgets.items()}
            for name, budgets in rows.items()
        },
        "quality": [asdict(quality) for quality in qualities],
    }
    (out / "frontier.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    _picture(rows, out / "frontier.png")


def _accuracies(rows: Rows) -> str:
    lines = []
    for name, budgets in _in_order(rows):
        for _, seeds in sorted(budgets.items()):
            found = list(seeds.values())
            lines.append(
                [
                    BY_NAME[name].title,
                    f"{statistics.mean(row.training_queries for row in found):,.0f}",
                    f"{statistics.mean(row.other_queries for row in found):,.0f}",
                    f"{statistics.mean(row.samples for row in found):,.0f}",
                    *(_over(found, lambda row, i=i: row.accuracy[i]) for i in range(len(RADII))),  # type: ignore[misc]
                    _over(found, lambda row: row.quality),
                    str(len(found)),
                ]
            )
    head = [
        "certified accuracy, %",
        "training queries",
        "other queries",
        "samples",
        "r = 0",
        *(f"{r:g}" for r in RADII[1:]),
        "validation agreement",
        "seeds",
    ]
    return table(head, lines)


def _as_good(rows: Rows) -> str:
    """The fewest training queries with which each variant is as good as the reference with what it spent; empty without
    a reference."""
    reference = rows.get(_REFERENCE, {})
    goals = [(_spent(seeds), _means(seeds)) for _, seeds in sorted(reference.items())]
    lines = []
    for name, budgets in _in_order(rows):
        if not goals or name == _REFERENCE:
            continue
        known = sorted((_spent(seeds), _means(seeds)) for seeds in budgets.values())
        cells = []
        for spent, goal in goals:
            # On average over the seeds, at every radius at once.
            enough = [mine for mine, means in known if all(a >= b for a, b in zip(means, goal, strict=True))]
            if not enough:
                cells.append("-")
            else:
                cells.append(f"{enough[0]:,.0f}" + (f" ({spent / enough[0]:.0f}x)" if enough[0] else ""))
        lines.append([BY_NAME[name].title, *cells])
    head = [f"as good as {BY_NAME[_REFERENCE].title} with", *(f"{spent:,.0f}" for spent, _ in goals)]
    return table(head, lines) if lines else ""


def _spent(seeds: Mapping[int, Row]) -> float:
    return statistics.mean(row.training_queries for row in seeds.values())


def _means(seeds: Mapping[int, Row]) -> list[float]:
    """Certified accuracy at the radii that are compared, on average over seeds."""
    return [statistics.mean(row.accuracy[radius] or 0.0 for row in seeds.values()) for radius in range(_SHOWN)]


def _qualities(qualities: Sequence[Quality]) -> str:
    groups: dict[tuple[int, int], list[Quality]] = {}
    for quality in qualities:
        groups.setdefault((list(BY_NAME).index(quality.variant), quality.budget), []).append(quality)
    lines = []
    for (_, budget), found in sorted(groups.items()):
        queries, cosine, ratio, batch = (
            statistics.mean(getattr(quality, part) for quality in found)
            for part in ("queries", "cosine", "norm_ratio", "batch_cosine")
        )
        title = BY_NAME[found[0].variant].title
        worth = f"{cosine**2 / queries:.4f}"
        lines.append([title, f"{budget:,}", f"{queries:.1f}", f"{cosine:.3f}", f"{ratio:.2f}", f"{batch:.3f}", worth])
    head = ["estimates at a run's end", "its budget", "queries a sample", "cosine", "norm ratio", "batch cosine"]
    return table([*head, "cosine^2 a query"], lines) if lines else "No estimates yet."


def _picture(rows: Rows, path: Path) -> None:
    figure, panels = plt.subplots(1, _SHOWN, figsize=(13.0, 4.6), layout="constrained")
    for panel, radius in zip(panels, range(_SHOWN), strict=True):
        for number, variant in enumerate(VARIANTS):
            budgets = rows.get(variant.name)
            if not budgets:
                continue
            points = []
            for seeds in budgets.values():
                values = [100 * (row.accuracy[radius] or 0.0) for row in seeds.values()]
                spent = _spent(seeds)
                points.append((spent, statistics.mean(values), min(values), max(values)))
            points.sort()
            x, mean, low, high = (list(column) for column in zip(*points, strict=True))
            colour = f"C{number % 10}"
            if not variant.queries:
                panel.axhline(
                    mean[0], color="grey", ls=":" if "ae" in variant.name else "--", lw=1, label=variant.title
                )
                continue
            style = _STYLES[number // 10]
            panel.plot(x, mean, style, marker="o", ms=3, color=colour, label=variant.title)
            panel.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        panel.set(xscale="log", xlabel="training queries", title=f"certified at r = {RADII[radius]:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())  # labels between powers of ten overlap
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("certified accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _in_order(rows: Rows) -> list[tuple[str, Mapping[int, Mapping[int, Row]]]]:
    return [(variant.name, rows[variant.name]) for variant in VARIANTS if variant.name in rows]


def _over(rows: Sequence[Row], value: Callable[[Row], float | None]) -> str:
    """Mean in %, and the range where there are several."""
    values = [found for row in rows if (found := value(row)) is not None]
    if len(values) < len(rows) or not values:
        return "-"
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"
