"""The columns: their presets, and what the paper prints for them."""

from __future__ import annotations

from dataclasses import dataclass

RADII = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: as the paper names it.
        preset: what is run.
        paper: certified accuracy on CIFAR-10 in % at `RADII`; None where the paper has no such column.
        retrained: whether the oracle hides the classifier that was retrained with noise.
        whitebox: whether the gradient is taken through the classifier.
        queries: whether gradients are made of queries.
    """

    title: str
    preset: str
    paper: tuple[float, float, float, float] | None = None
    retrained: bool = False
    whitebox: bool = False
    queries: bool = False


def _zo(title: str, preset: str, paper: tuple[float, float, float, float]) -> Column:
    return Column(title, preset, paper, queries=True)


COLUMNS = (
    Column("undefended", "standard"),
    Column("RS", "rs", (76.44, 60.64, 41.19, 21.11), retrained=True),
    Column("MSE only, DS", "mse-ds"),
    Column("MSE only, AE-DS", "mse-ae-ds"),
    Column("FO-DS", "fo-ds", (71.80, 51.74, 30.22, 11.87), whitebox=True),
    Column("FO-AE-DS", "fo-ae-ds", (75.97, 59.12, 38.50, 18.18), whitebox=True),
    _zo("ZO-DS, RGE q = 20", "zo-ds-rge-q20", (19.50, 3.89, 0.60, 0.03)),
    _zo("ZO-DS, RGE q = 100", "zo-ds-rge-q100", (41.38, 18.05, 4.78, 0.32)),
    _zo("ZO-DS, RGE q = 192", "zo-ds-rge-q192", (44.81, 19.16, 5.06, 0.30)),
    _zo("ZO-AE-DS, RGE q = 20", "zo-ae-ds-rge-q20", (42.72, 29.57, 17.85, 8.52)),
    _zo("ZO-AE-DS, RGE q = 100", "zo-ae-ds-rge-q100", (58.61, 40.96, 24.28, 9.45)),
    _zo("ZO-AE-DS, RGE q = 192", "zo-ae-ds-rge-q192", (63.13, 45.69, 27.84, 10.89)),
    _zo("ZO-AE-DS, CGE", "zo-ae-ds-cge", (72.23, 54.87, 35.50, 16.37)),
)
BY_PRESET = {column.preset: column for column in COLUMNS}

# What must show, as (above, below): at the same schedule, and at equal queries.
ORDERINGS = (
    *((f"zo-ae-ds-rge-q{q}", f"zo-ds-rge-q{q}") for q in (20, 100, 192)),
    *(("zo-ae-ds-cge", f"zo-ae-ds-rge-q{q}") for q in (20, 100, 192)),
    ("fo-ae-ds", "zo-ae-ds-cge"),
)
