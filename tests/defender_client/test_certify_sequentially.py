"""Sequential certification, over HTTP and in front of local classifiers: rows, their cost, kills, settings."""

from __future__ import annotations

import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from defender_support import Interfering, Killed, Trained, at, certify_here, opened, spent, spent_by_purpose, train_here
from oracle_support import Caller, Running
from test_certify import without_time
from torch import Tensor, nn
from typer.testing import CliRunner

from defender_client import config as configs
from defender_client import stack as stacks
from defender_client.audit import audit
from defender_client.certify import CERTIFIED_FILE, HEADER, HEADERS, Row, certified_accuracy, certify, cost, read
from defender_client.cli import app
from defender_client.config import CERTIFY_FILE, ConfigError, RunConfig, load_preset
from defender_client.data import load_test
from defender_client.jobs import certify_job
from defender_client.plan import PlanUnaffordable, plan
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.report import read_run, report
from defender_client.sequential import design
from defender_client.smoothing import ABSTAIN, Smooth
from defender_client.sources import LiveOracle
from defender_client.train import STACK_FILE

RADII = (0.0, 0.1, 0.25)
IMAGES, N0, N = 6, 10, 400
ORIGIN = torch.zeros(1, 1, 2)


def sequential(config: RunConfig, **changes: object) -> RunConfig:
    """The same run, certified sequentially."""
    values = {"method": "sequential", "radii": RADII, "n": N, "images": IMAGES, **changes}
    return config.model_copy(update={"certify": config.certify.model_copy(update=values)})


@pytest.fixture(scope="module")
def trained(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The undefended classifier, certified with a fixed n: of all kinds of images, and made at once."""
    folder, caller = tmp_path_factory.mktemp("undefended"), server.caller(10**6)
    config = load_preset("standard", ["certify.n0=10", "certify.n=100", "certify.images=4", "certify.in_flight=1"])
    train_here(config, folder / "run", server.url, caller.key)
    certify_here(config, folder / "run", server.url, caller.key)
    return Trained(folder / "run", config, caller)


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A trained run that is not certified yet."""
    return fresh(trained, tmp_path / "run")


def fresh(trained: Trained, folder: Path) -> Path:
    folder.mkdir()
    for name in (configs.CONFIG_FILE, STACK_FILE):
        shutil.copy(trained.run / name, folder / name)
    return folder


def timeless(path: Path) -> list[str]:
    """The lines, but for the time."""
    return [re.sub(r"\t\d:\d\d:\d\d(\.\d+)?", "", line) for line in path.read_text().splitlines()]


# --- one image --------------------------------------------------------------------------------------------------------


def half_space(images: Tensor) -> Tensor:
    """Class 1 where the first number is positive, else class 0: the true radius is that number."""
    margin = images[:, 0, 0, :1]
    return torch.cat([-margin, margin], dim=1)


@pytest.mark.parametrize("batch", [7, 64, 1000])
def test_the_draws_are_those_of_the_fixed_certification_as_far_as_they_go(batch: int) -> None:
    seen: list[Tensor] = []

    def spy(images: Tensor) -> Tensor:
        seen.append(images.clone())
        return half_space(images)

    plan_, x = design(0.5, 0.01, 1000, (0.0, 0.5)), ORIGIN + torch.tensor([0.45, 0.0])
    smooth = Smooth(spy, 2, 0.5)
    found = smooth.certify_sequentially(x, 36, plan_, batch, torch.Generator().manual_seed(1))
    own = torch.cat(seen)
    seen.clear()
    smooth.certify(x, 36, 1000, 0.01, batch, torch.Generator().manual_seed(1))
    assert len(own) == found.queries == 36 + found.n
    assert torch.equal(own, torch.cat(seen)[: len(own)])
    votes = half_space(own[36:]).argmax(1)
    assert found.successes == int((votes == found.selected).sum())
    assert found.n == plan_.at[found.looks - 1]
    assert found.method == "sequential"


def test_what_it_finds_is_what_the_design_says_of_its_counts() -> None:
    plan_ = design(0.5, 0.05, 700, (0.0, 0.2, 0.5))
    labels = set()
    for number in range(60):
        distance = 0.02 * number - 0.1
        votes: list[Tensor] = []

        def spy(images: Tensor, votes: list[Tensor] = votes) -> Tensor:
            scores = half_space(images)
            votes.append(scores.argmax(1))
            return scores

        x = ORIGIN + torch.tensor([distance, 0.0])
        smooth, generator = Smooth(spy, 2, 0.5), torch.Generator().manual_seed(number)
        found = smooth.certify_sequentially(x, 20, plan_, 1000, generator)
        failed = (torch.cat(votes)[20:] != found.selected).cumsum(0)
        here = [int(failed[min(t, found.n) - 1]) for t in plan_.at]
        reached, draws = plan_.follow(torch.tensor([here]).numpy())
        assert found.n == draws[0]
        assert found.radius == (plan_.radii[reached[0] - 1] if reached[0] else 0)
        assert found.label == (found.selected if reached[0] else ABSTAIN)
        assert found.abstained == (not reached[0])
        labels.add(found.label)
    assert labels >= {ABSTAIN, 1}


def test_wrong_certificates_of_images_are_as_rare_as_promised() -> None:
    """Real draws of a half space at the edge of a target: its class is certain, and no radius beyond."""
    from scipy.stats import binomtest

    plan_, x, alpha = design(0.5, 0.05, 192, (0.0, 0.25)), ORIGIN + torch.tensor([0.25, 0.0]), 0.05
    smooth, generator = Smooth(half_space, 2, 0.5), torch.Generator().manual_seed(5)
    found = [smooth.certify_sequentially(x, 20, plan_, 1000, generator) for _ in range(3000)]
    wrong = sum(c.label == 0 or c.radius >= 0.25 for c in found)
    assert binomtest(wrong, 3000, alpha, alternative="greater").pvalue > 1e-6
    assert wrong > 0.3 * alpha * 3000


def test_a_design_for_another_sigma_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be for sigma 0.25, not 0.5"):
        Smooth(half_space, 2, 0.25).certify_sequentially(
            ORIGIN, 10, design(0.5, 0.05, 192, (0.0,)), 10, torch.Generator()
        )


# --- over a server ----------------------------------------------------------------------------------------------------


def test_rows_say_the_method_and_what_each_image_cost_and_the_ledger_agrees(
    server: Running, caller: Caller, run: Path, trained: Trained, classifier: nn.Module
) -> None:
    config = sequential(trained.config)
    rows = certify_here(config, run, server.url, caller.key)
    header, *lines = (run / CERTIFIED_FILE).read_text().splitlines()
    assert header == "idx\tlabel\tpredict\tradius\tcorrect\ttime\tqueries\tmethod"
    pattern = re.compile(r"\d+\t\d\t(-1|\d)\t\d+\.\d{6}\t[01]\t\d:\d\d:\d\d(\.\d{6})?\t\d+\tsequential")
    assert [line for line in lines if not pattern.fullmatch(line)] == []
    assert rows == read(run / CERTIFIED_FILE)
    cost_ = sum(row.queries or 0 for row in rows)
    assert spent(server, caller) == QueryLog.read(run / LOG_FILE).total == cost_ < IMAGES * (N0 + N)
    assert spent_by_purpose(server, caller) == {"certify": cost_}
    with opened(run, server.url, caller.key) as oracle:
        assert audit([run], oracle).equal

    # The same in front of a local classifier.
    stack, test = stacks.load(run / STACK_FILE), load_test(trained.config.data, None)
    smooth = Smooth(lambda images: classifier(stack(images)), 10, 0.25)
    for row in rows:
        x, generator = test.floats(slice(row.idx, row.idx + 1))[0], torch.Generator().manual_seed(row.idx)
        found = smooth.certify_sequentially(x, N0, design(0.25, 0.001, N, RADII), 1000, generator)
        assert (row.predict, row.queries, row.method) == (found.label, found.queries, "sequential")
        assert 0 <= found.radius - row.radius < 1e-6
        assert row.correct == (row.predict == row.label)
    assert len({row.queries for row in rows}) > 1
    assert any(row.radius in RADII[1:] or row.radius > 0 for row in rows)


def test_a_target_that_is_reached_is_written_as_itself(
    server: Running, caller: Caller, run: Path, trained: Trained
) -> None:
    """Radii of no special form, and rounding that might take a millionth off."""
    odd = (0.07, 0.123457, 0.290001)
    rows = certify_here(sequential(trained.config, radii=odd), run, server.url, caller.key)
    grid = [*design(0.25, 0.001, N, odd).radii]
    for row in rows:
        assert row.radius in odd or any(0 <= r - row.radius < 1e-6 for r in grid)
        for target in odd:
            assert (row.radius >= target) == (max((r for r in grid if r - row.radius < 1e-6), default=0) >= target)


def test_three_in_flight_write_the_same_bits_as_one(
    server: Running, caller: Caller, trained: Trained, tmp_path: Path
) -> None:
    written, requests = [], []
    for in_flight in (1, 3):
        folder = fresh(trained, tmp_path / str(in_flight))
        late = Interfering(lambda number: time.sleep(0.03 if number % 3 == 0 else 0))
        certify_here(sequential(trained.config, in_flight=in_flight), folder, server.url, caller.key, late)
        written.append(timeless(folder / CERTIFIED_FILE))
        log = QueryLog.read(folder / LOG_FILE)
        requests.append({key.partition("/")[2]: request.rows for key, request in log.requests.items()})
    assert written[0] == written[1]
    assert requests[0] == requests[1]
    assert [line.split("\t")[0] for line in written[0]] == ["idx", *map(str, range(IMAGES))]


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_kill_in_the_middle_of_an_image_changes_and_costs_nothing(
    server: Running, caller: Caller, trained: Trained, tmp_path: Path, in_flight: int
) -> None:
    whole, killed = fresh(trained, tmp_path / "whole"), fresh(trained, tmp_path / "killed")
    config, other = sequential(trained.config, in_flight=in_flight), server.caller(10**6)
    rows = certify_here(config, whole, server.url, other.key)
    kills = 0
    for number, lost in ((5, True), (3, False), (7, True), (1, False)):
        transport = Interfering(**{"after" if lost else "before": at(number, Killed())})
        with suppress(Killed):
            certify_here(config, killed, server.url, caller.key, transport)
            break  # what was in flight beside the requests that were killed got it through sooner
        kills += 1
    assert kills >= 2
    assert certify_here(config, killed, server.url, caller.key) == rows
    assert timeless(killed / CERTIFIED_FILE) == timeless(whole / CERTIFIED_FILE)
    assert spent(server, caller) == spent(server, other) == sum(row.queries or 0 for row in rows)


def test_a_budget_that_ends_midway_is_told_and_more_of_it_goes_on(server: Running, run: Path, trained: Trained) -> None:
    config = sequential(trained.config, images=4)
    poor = server.caller(4 * (N0 + 64))
    source = LiveOracle(server.url, poor.key)
    configs.save_certify_settings(config.certify, run)
    said = CliRunner().invoke(
        app, ["certify", "--run", str(run), "--oracle", server.url], env={"ORACLE_API_KEY": poor.key}
    )
    assert said.exit_code == 3
    done = len(read(run / CERTIFIED_FILE))
    assert done < 4
    server.ledger.set_budget(poor.client.name, 10**6)
    certified = certify_job(run, None, source, {}, lambda _: None)
    assert [row.idx for row in certified.rows] == [0, 1, 2, 3]
    assert spent(server, poor) == sum(row.queries or 0 for row in certified.rows)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_says_at_most_and_refuses_below_the_least(server: Running, run: Path, trained: Trained) -> None:
    config, spec = sequential(trained.config, images=4), stacks.load(run / STACK_FILE).spec
    assert cost(config.certify) == (N0 + 64, N0 + N)
    for budget, affordable in ((4 * (N0 + 64), True), (4 * (N0 + 64) - 1, False)):
        with opened(run, server.url, server.caller(budget).key) as oracle:
            planned = plan(config, spec, run, (0, 0, 360), oracle)
            assert (planned.least, planned.certification) == (4 * (N0 + 64), 4 * (N0 + N))
            if affordable:
                planned.check_certification()
            else:
                with pytest.raises(PlanUnaffordable, match="at the least, needs 296"):
                    planned.check_certification()


def test_what_an_interrupted_image_paid_is_counted(
    server: Running, caller: Caller, run: Path, trained: Trained
) -> None:
    config = sequential(trained.config, images=1)
    with pytest.raises(Killed):
        certify_here(config, run, server.url, caller.key, Interfering(at(3, Killed())))  # selection and a first look
    with opened(run, server.url, caller.key) as oracle:
        planned = plan(config, stacks.load(run / STACK_FILE).spec, run, (0, 0, 360), oracle)
    assert (planned.least, planned.certification) == (0, N - 64)


# --- settings, files, commands ----------------------------------------------------------------------------------------


def test_one_method_is_not_continued_by_the_other(server: Running, caller: Caller, run: Path, trained: Trained) -> None:
    config = sequential(trained.config, images=1)
    certify_here(config, run, server.url, caller.key)
    with pytest.raises(ConfigError, match="method: 'sequential' -> 'fixed'"):
        configs.certify_settings(config, run, {"method": "fixed"})
    (run / CERTIFY_FILE).unlink()  # the rows say it too
    stack, test = stacks.load(run / STACK_FILE), load_test(config.data, None)
    with (
        opened(run, server.url, caller.key) as oracle,
        pytest.raises(ConfigError, match="does not start with the head"),
    ):
        certify(stack, oracle, test, trained.config.certify, 0, run / CERTIFIED_FILE)


def test_settings_of_before_there_were_methods_are_fixed(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / CERTIFY_FILE).write_text('{"n0": 10, "n": 100, "alpha": 0.001, "images": 4}')
    assert configs.certify_settings(trained.config, tmp_path, {}).method == "fixed"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "sequential", "radii": [0.0, 0.5]}, "at most 0.37"),
        ({"method": "sequential", "radii": []}, "radii"),
        ({"method": "sequential", "radii": [-0.1]}, "radii"),
        ({"method": "sequential", "radii": [1 / 3]}, "six decimals"),
        ({"method": "often"}, "method"),
        ({"radii": [0.1]}, "--method sequential"),
    ],
)
def test_what_cannot_be_aimed_at_is_refused_before_anything_is_asked(
    run: Path, trained: Trained, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        certify_job(run, None, LiveOracle("http://127.0.0.1:9", "key"), changes, lambda _: None)


def test_radii_are_sorted_and_each_once(trained: Trained, tmp_path: Path) -> None:
    changes = {"method": "sequential", "radii": [0.25, 0, 0.25]}
    assert configs.certify_settings(trained.config, tmp_path, changes).radii == (0.0, 0.25)


@pytest.mark.parametrize(
    "row", ["0\t1\t1\t0.1\t1\t0:00:01", "0\t1\t1\t0.1\t1\t0:00:01\t74", "0\t1\t1\t0.1\t1\t0:00:01\t74\tfixed"]
)
def test_a_row_of_another_form_is_told(tmp_path: Path, row: str) -> None:
    path = tmp_path / CERTIFIED_FILE
    path.write_text(f"{HEADERS['sequential']}\n{row}\n")
    with pytest.raises(ConfigError, match="not a row"):
        read(path, "sequential")


def test_both_forms_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / CERTIFIED_FILE
    path.write_text(f"{HEADERS['sequential']}\n0\t1\t1\t0.250000\t1\t0:00:01\t484\tsequential\n")
    assert read(path) == [Row(0, 1, 1, 0.25, 1, 484, "sequential")]
    assert certified_accuracy(read(path), 0.25) == 1
    path.write_text(f"{HEADER}\n0\t1\t1\t0.250000\t1\t0:00:01\n")
    assert read(path) == [Row(0, 1, 1, 0.25, 1, None, "fixed")]


def test_the_command_and_the_report(server: Running, caller: Caller, run: Path, trained: Trained) -> None:
    arguments = ["certify", "--run", str(run), "--oracle", server.url, "--method", "sequential", "--n", "400"]
    arguments += ["--images", "3", "--radii", "0", "--radii", "0.25"]
    said = CliRunner().invoke(app, arguments, env={"ORACLE_API_KEY": caller.key})
    assert said.exit_code == 0, said.output
    assert f"will spend at most {3 * (N0 + N):,} more queries" in said.output
    rows = read(run / CERTIFIED_FILE)
    each = sum(row.queries or 0 for row in rows) / 3
    assert f"sequential: {each:,.0f} queries an image, at most 410" in said.output
    shown = read_run(run).table_row
    assert (shown["method"], shown["queries_per_image"]) == ("sequential", each)
    assert shown["accuracy"][2:] == [None, None]  # not aimed at
    report([run], run / "report.html", None)
    page = (run / "report.html").read_text()
    assert f"<td>sequential</td>\n<td>{each:,.0f}</td>" in page


def test_a_fixed_file_is_as_it_was(trained: Trained) -> None:
    assert without_time(trained.run / CERTIFIED_FILE)[0] == "idx\tlabel\tpredict\tradius\tcorrect"
