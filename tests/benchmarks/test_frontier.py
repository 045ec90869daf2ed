"""The frontier as a command: variants and budgets over HTTP, again for nothing; and the quality of estimates."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_table import ledgers

from benchmarks.frontier.__main__ import options
from benchmarks.frontier.making import make_frontier
from benchmarks.frontier.variants import BY_NAME, VARIANTS
from benchmarks.frontier.writing import _as_good
from benchmarks.measuring import Failed
from benchmarks.table.runs import Row
from defender_client.config import load_preset

FEW = ["cge-central", "active-cge", "prior-q2", "distil", "mse-ae-ds"]


def test_every_variant_is_a_configuration_of_its_own() -> None:
    assert len(BY_NAME) == len(VARIANTS)
    made = [load_preset(variant.preset, ["data.dataset=digits", *variant.settings], "cpu") for variant in VARIANTS]
    assert len({config.model_dump_json() for config in made}) == len(made)
    trained = [config for config, variant in zip(made, VARIANTS, strict=True) if variant.queries]
    assert all(config.estimator.zeroth_order for config in trained)
    # The rest is alike, among those from scratch and among those that begin warm: rate, schedule, batch, pre-training.
    for preset in ("zo-ae-ds-cge", "zo-ae-ds"):
        alike = [c for c in trained if c.preset == preset]
        assert len(alike) > 1
        assert len({(c.train.lr, c.train.batch, c.train.schedule, c.pretrain.model_dump_json()) for c in alike}) == 1
    assert all((c.pretrain.denoiser_epochs > 0) == (c.preset == "zo-ae-ds") for c in trained)


def test_the_frontier_over_http_and_again_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*more: str) -> None:
        arguments = ["--out", str(tmp_path), "--scale", "smoke", "--images", "4", "--seeds", "0", "--variants", *FEW]
        arguments += ["--samples", "25", "10000"]
        monkeypatch.setattr(sys, "argv", ["frontier", *arguments, *more])
        make_frontier(options())

    run("--budgets", "1000", "2000")
    found = json.loads((tmp_path / "frontier.json").read_text())
    assert set(found["rows"]) == set(FEW)
    for name, budgets in found["rows"].items():
        for budget, seeds in budgets.items():
            spent = seeds["0"]["training_queries"]
            assert seeds["0"]["audit"] == "equal"
            # Whole steps; what active latents cost is foreseen to within what training changes.
            assert (spent == 0) == (name == "mse-ae-ds") == (budget == "0")
            if name in ("cge-central", "distil"):
                step = {"cge-central": 32, "distil": 1}[name] * 25
                assert spent == int(budget) // step * step
            elif spent:
                assert 0.5 * int(budget) < spent < 1.5 * int(budget)
    quality = {(entry["variant"], entry["budget"]): entry for entry in found["quality"]}
    assert len(quality) == 4 * 2
    for budget in (1000, 2000):
        assert quality["cge-central", budget]["cosine"] > 0.98
        assert quality["cge-central", budget]["queries"] == 32
        assert quality["active-cge", budget]["batch_cosine"] > 0.95
        assert quality["active-cge", budget]["queries"] < 17
        assert abs(quality["distil", budget]["cosine"]) <= 1
    text = (tmp_path / "frontier.md").read_text()
    assert "CGE, central" in text
    assert "as good as CGE, central" in text
    assert (tmp_path / "frontier.png").stat().st_size > 10_000

    spent_before = ledgers(tmp_path)
    run("--budgets", "1000", "2000")
    assert ledgers(tmp_path) == spent_before
    run("--budgets", "20", "3000000")  # too few samples, and too many
    assert ledgers(tmp_path) == spent_before
    with pytest.raises(Failed, match="one step takes"):
        run("--budgets", "10", "--samples", "1", "100")


def test_as_good_is_the_fewest_queries_that_reach_the_reference_at_every_radius() -> None:
    def rows(*points: tuple[int, float, float, float]) -> dict[int, dict[int, Row]]:
        return {
            spent: {seed: _row(spent, [a, b, c, None]) for seed, a in enumerate((first - 0.1, first + 0.1))}
            for spent, first, b, c in points
        }

    def _row(spent: int, accuracy: list[float | None]) -> Row:
        return Row("p", 0, 9, 9, accuracy, 0.0, spent, 0, 0, 0, 0, {}, 9, None, "equal")

    text = _as_good(
        {
            "cge-central": rows((1000, 0.5, 0.3, 0.1), (8000, 0.7, 0.5, 0.2)),
            "prior-q2": rows((50, 0.6, 0.2, 0.2), (100, 0.5, 0.3, 0.1), (400, 0.9, 0.6, 0.3)),
            "distil": rows((10, 0.6, 0.4, 0.2)),
        }
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert cells[0][1:] == ["1,000", "8,000"]
    assert cells[2][1:] == ["100 (10x)", "400 (20x)"]
    assert cells[3][1:] == ["10 (100x)", "-"]
    assert _as_good({"distil": rows((10, 0.6, 0.4, 0.2))}) == ""
