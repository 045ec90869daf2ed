"""The paper's table as a command: columns over HTTP, each with its own client and budget, and again for nothing."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.measuring import Failed
from benchmarks.table.__main__ import RETRAINING, options
from benchmarks.table.columns import BY_PRESET, COLUMNS, ORDERINGS
from benchmarks.table.comparing import difference
from benchmarks.table.making import make_table
from defender_client.certify import Row
from defender_client.config import preset_names
from defender_client.query_log import QueryLog
from oracle_server.ledger import Ledger

FEW = ["standard", "fo-ae-ds", "zo-ds-rge-q20", "zo-ae-ds-cge"]


def rows(hits: list[int], radius: float = 0.6) -> list[Row]:
    return [Row(idx, 1, 1 if hit else 0, radius, hit) for idx, hit in enumerate(hits)]


def test_every_column_is_a_preset_and_has_the_paper_s_figures() -> None:
    assert {column.preset for column in COLUMNS} <= set(preset_names())
    assert sum(column.paper is not None for column in COLUMNS) == 10
    assert BY_PRESET["zo-ae-ds-cge"].paper == (72.23, 54.87, 35.50, 16.37)
    assert {name for pair in ORDERINGS for name in pair} <= set(BY_PRESET)


def test_a_difference_is_judged_by_the_images_on_which_the_columns_differ() -> None:
    generator = np.random.default_rng(0)
    above, below = generator.integers(0, 2, 200), generator.integers(0, 2, 200)
    found = difference({0: rows(above.tolist())}, {0: rows(below.tolist())}, 0.5)
    paired = stats.ttest_rel(above, below)
    interval = stats.norm.interval(0.95, loc=np.mean(above - below), scale=stats.sem(above - below))
    assert found.mean == pytest.approx(float(np.mean(above - below)))
    assert found.mean - found.half == pytest.approx(interval[0], rel=1e-3)
    assert found.mean / (found.half / 1.96) == pytest.approx(float(paired.statistic), rel=1e-6)


def test_verdicts() -> None:
    all_right, all_wrong, half = rows([1] * 50), rows([0] * 50), rows([0, 1] * 25)
    assert difference({0: all_right}, {0: half}, 0.5).verdict == "holds"
    assert difference({0: all_wrong}, {0: half}, 0.5).verdict == "reversed"
    assert difference({0: half}, {0: half}, 0.5).verdict == "undecided"
    assert difference({0: all_right}, {0: half}, 0.75).mean == 0.0  # certified, but not so far
    two = difference({0: all_right, 1: all_wrong}, {0: half, 1: half, 2: half}, 0.0)
    assert (two.mean, two.by_seed) == (0.0, (0.5, -0.5))
    with pytest.raises(ValueError, match="seed"):
        difference({0: half}, {1: half}, 0.0)
    with pytest.raises(ValueError, match="images"):
        difference({0: half}, {0: half[:-1]}, 0.0)
    assert math.isinf(difference({0: half[:1]}, {0: half[:1]}, 0.0).half)


def ledgers(out: Path) -> dict[str, tuple[int, int]]:
    """Budget and spent of each client."""
    found = {}
    for path in out.glob("oracle*/ledger.db"):
        ledger = Ledger.open(f"sqlite:///{path}")
        found |= {client.name: (client.budget, client.spent) for client in ledger.list_clients()}
        ledger.close()
    return found


def test_the_table_over_http_and_again_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*more: str) -> None:
        arguments = ["--out", str(tmp_path), "--scale", "smoke", "--images", "4", "--columns", *FEW, *more]
        monkeypatch.setattr(sys, "argv", ["table", *arguments])
        make_table(options(), RETRAINING)

    run("--equal-queries", "1000")
    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table) == FEW
    for preset, seeds in table.items():
        row = seeds["0"]
        assert row["certification_queries"] == 4 * 110
        assert row["audit"] == "equal"
        assert (row["training_queries"] > 0) == preset.startswith("zo-")
        log = QueryLog.read(tmp_path / "runs" / "seed-0" / preset / "queries.jsonl")
        assert log.total == row["training_queries"] + row["other_queries"] + row["certification_queries"]
    equal = json.loads((tmp_path / "equal-queries.json").read_text())
    assert list(equal) == ["zo-ds-rge-q20", "zo-ae-ds-cge"]
    # Whole steps of 25 samples: 21 queries each, and 2 x 16.
    assert [equal[p]["0"]["training_queries"] for p in equal] == [525, 800]
    spent = ledgers(tmp_path)
    assert len(spent) == len(FEW) + 2
    assert all(budget == paid > 0 for budget, paid in spent.values())  # a budget is the plan, to the query
    text = (tmp_path / "table.md").read_text()
    assert "ZO-AE-DS, CGE above" not in text  # RGE was not asked for
    assert "FO-AE-DS above ZO-AE-DS, CGE" in text
    assert "72.2 / 54.9 / 35.5 / 16.4" in text
    assert (tmp_path / "certified-accuracy.png").stat().st_size > 10_000
    assert (tmp_path / "equal-queries.png").stat().st_size > 5_000
    capsys.readouterr()

    (tmp_path / "runs" / "seed-0" / "zo-ae-ds-cge" / "table-row.json").unlink()  # as after a kill just before the end
    run("--equal-queries", "1000")
    assert ledgers(tmp_path) == spent
    again = json.loads((tmp_path / "table.json").read_text())
    for values in (table, again):
        for seeds in values.values():
            seeds["0"].pop("seconds")
    assert again == table

    shutil.rmtree(tmp_path / "runs" / "seed-0" / "zo-ds-rge-q20")  # begun anew: it has an account of its own
    run("--equal-queries", "1000")
    assert ledgers(tmp_path).items() > spent.items()
    assert all(budget == paid > 0 for budget, paid in ledgers(tmp_path).values())


def test_queries_that_pay_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--out", str(tmp_path), "--scale", "smoke", "--equal-only", "--equal-queries", "20"]
    monkeypatch.setattr(sys, "argv", ["table", *arguments, "--columns", "zo-ds-rge-q20"])
    with pytest.raises(Failed, match="525"):
        make_table(options(), RETRAINING)
