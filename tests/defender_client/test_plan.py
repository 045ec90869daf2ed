"""What a run will cost: against the ledger afterwards (see also test_train), the budget, and other people's servers."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import pytest
from defender_support import RGE, Interfering, Killed, Trained, at, certify_here, spent, tiny
from oracle_support import Caller, Running, digits

from defender_client import plan as plans
from defender_client.certify import CERTIFIED_FILE, read
from defender_client.config import RunConfig, load_preset
from defender_client.oracle_client import RemoteOracle
from defender_client.plan import Plan, PlanUnaffordable, plan, queries_per_sample
from defender_client.stack import specify
from shared.wire import protocol

SIZES = (96, 16, 360)


def planned(config: RunConfig, oracle: RemoteOracle, run: Path | None = None, *, measure: bool = False) -> Plan:
    return plan(config, specify(config, (1, 8, 8), 10), run, SIZES, oracle, measure=measure)


def test_every_number_of_a_plan(oracle: RemoteOracle, tmp_path: Path, server: Running, caller: Caller) -> None:
    result = planned(tiny(tmp_path, "train.epochs=5", "train.validate_every=2"), oracle)
    training = 5 * 96 * 9
    assert (result.labels, result.training, result.validation) == (112, training, 3 * 16)  # after 2, 4 and 5
    assert result.noise == 3 * (4 * 7 + 2 * (1 + 2 * 8))  # points, lines of 7; twice the point and 8 directions
    assert result.certification == 4 * 110
    assert result.to_train == 186 + 112 + training + 48
    assert result.total == result.to_train + 440
    assert result.samples == 5 * 96
    assert (result.bytes_up, result.bytes_down) == (result.total * 64 * 4, result.total * 10 * 4)
    assert result.remaining == 10**6
    assert result.seconds is None
    assert spent(server, caller) == 0


def test_all_images_are_certified_by_default(oracle: RemoteOracle, tmp_path: Path) -> None:
    assert planned(tiny(tmp_path, "certify.images=0"), oracle).certification == 360 * 110
    assert planned(tiny(tmp_path, "certify.images=999"), oracle).certification == 360 * 110


def test_the_undefended_run_costs_its_certification_only(oracle: RemoteOracle) -> None:
    result = planned(load_preset("standard", ["certify.images=10"]), oracle)
    assert (result.to_train, result.certification) == (0, 10 * 10_100)


@pytest.mark.parametrize(
    ("preset", "each"),
    [("zo-ae-ds-cge", 193), ("zo-ds-cge", 3073), ("zo-ae-ds-rge-q20", 21), ("zo-ds-rge-q192", 193)],
)
def test_what_the_paper_s_presets_cost_a_sample(preset: str, each: int) -> None:
    config = load_preset(preset)
    central = config.estimator.difference == "central"
    expected = 2 * (each - 1) if central else each
    assert queries_per_sample(config, specify(config, (3, 32, 32), 10)) == expected


def test_what_cannot_be_paid_is_refused_with_the_numbers() -> None:
    def plan_of(remaining: int | None) -> Plan:
        return Plan(7, 3, 100, 20, 1000, 50, 0, 0, None, remaining)

    for enough in (130, None):
        plan_of(enough).check_training()
    with pytest.raises(PlanUnaffordable, match=r"training needs 130 queries and the budget has 129 left \(1 too few\)"):
        plan_of(129).check_training()
    plan_of(1000).check_certification()
    with pytest.raises(PlanUnaffordable, match="certification needs 1,000") as told:
        plan_of(999).check_certification()
    assert (told.value.needed, told.value.remaining) == (1000, 999)


def test_what_is_done_is_not_counted_again(oracle: RemoteOracle, trained: Trained) -> None:
    result = planned(trained.config, oracle, trained.run)
    assert (result.labels, result.training, result.validation, result.certification, result.samples) == (0,) * 5
    more = trained.config.model_copy(update={"certify": trained.config.certify.model_copy(update={"images": 7})})
    assert planned(more, oracle, trained.run).total == 3 * 110


def test_without_its_log_a_run_is_planned_from_its_checkpoint(
    oracle: RemoteOracle, trained: Trained, tmp_path: Path
) -> None:
    shutil.copytree(trained.run, tmp_path / "run")
    (tmp_path / "run" / "queries.jsonl").unlink()
    assert planned(trained.config, oracle, tmp_path / "run").total == 0


def test_an_image_that_was_certified_in_part_is_counted_in_part(
    server: Running, caller: Caller, oracle: RemoteOracle, trained: Trained, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run, run, ignore=shutil.ignore_patterns("queries.jsonl", "certif*"))
    for number, lost in ((4, True), (3, True), (2, False)):
        transport = Interfering(**{"after" if lost else "before": at(number, Killed())})
        with pytest.raises(Killed):
            certify_here(trained.config, run, server.url, caller.key, transport)
        assert spent(server, caller) + planned(trained.config, oracle, run).certification == 440
    assert len(read(run / CERTIFIED_FILE)) == 2
    other = trained.config.certify.model_copy(update={"n": 50})
    assert planned(trained.config.model_copy(update={"certify": other}), oracle, run).certification == 2 * 60


def test_the_time_is_measured_once_the_oracle_has_answered(
    oracle: RemoteOracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "_TRIAL_SECONDS", 0.05)
    oracle.query(digits(8), purpose="x", label="x")
    for settings in ((), RGE):
        result = planned(tiny(tmp_path, *settings), oracle, measure=True)
        assert result.seconds is not None
        assert 0 < result.seconds < 3600


FOREIGN = {
    "name": "classifier",
    "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
    "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
}


def test_a_server_that_keeps_no_account_is_planned_for_too(tmp_path: Path) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        assert request.url.path != protocol.INFER_ROUTE
        if request.url.path == protocol.METADATA_ROUTE:
            return httpx.Response(200, json=FOREIGN)
        return httpx.Response(404, json={"error": "no such route"})

    with RemoteOracle("http://foreign", transport=httpx.MockTransport(handle)) as oracle:
        result = planned(tiny(tmp_path), oracle, measure=True)
    assert (result.remaining, result.seconds) == (None, None)
    result.check_training()
    result.check_certification()
