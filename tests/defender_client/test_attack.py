"""Attacks over HTTP: what they find, what they cost, and that a kill changes neither."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from defender_support import Interfering, Killed, at, opened, spent, spent_by_purpose, tiny, train_here
from oracle_support import Caller, Running
from pyautoattack.square import SquareAttack
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from defender_client import config as configs
from defender_client import printing
from defender_client import stack as stacks
from defender_client.attack import HEADER, Row, attack, craft, read, summary
from defender_client.cli import app
from defender_client.config import ConfigError, load_preset
from defender_client.data import gaussian, load_splits, load_test
from defender_client.losses import mean_log_scores
from defender_client.pretrain import pretrain
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.report import read_run
from defender_client.square import Found, check_size, square
from defender_client.train import STACK_FILE
from oracle_server.loading import load_classifier as hidden
from oracle_server.settings import Settings

WEIGHTS = Path(__file__).parents[2] / "oracle_server" / "weights" / "digits-cnn.safetensors"
DIGEST = "0" * 64
WELL = (
    "autoencoder.latent=32",
    "autoencoder.width=16",
    "pretrain.autoencoder_epochs=30",
    "pretrain.denoiser_epochs=4",
    "pretrain.lr=0.005",
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from several, which wait for each other wherever the processors are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def defended(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stack is pre-trained until most images survive it."""
    folder = tmp_path_factory.mktemp("defended")
    config = tiny(folder, "data.train_images=600", *WELL)
    spec = stacks.specify(config, (1, 8, 8), 10)
    configs.save(config, folder / "run")
    stacks.save(pretrain(config, spec, folder / "run", load_splits(config.data, None, 0)), folder / "run" / STACK_FILE)
    return folder / "run"


@pytest.fixture
def run(defended: Path, tmp_path: Path) -> Path:
    """The same, not attacked yet."""
    return copied(defended, tmp_path / "run")


@pytest.fixture(scope="session")
def undefended(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the preset `standard`: its stack is the identity."""
    folder = tmp_path_factory.mktemp("undefended")
    train_here(load_preset("standard"), folder, server.url, server.caller(10).key)
    return folder


def copied(run: Path, folder: Path) -> Path:
    """Configuration and stack of a run, in a directory of their own."""
    folder.mkdir()
    for name in (configs.CONFIG_FILE, STACK_FILE):
        shutil.copy(run / name, folder / name)
    return folder


def attack_here(
    run: Path, url: str, key: str, classifier: nn.Module | None, transport: Any = None, **changes: Any
) -> list[Row]:
    """What `attack` does, without the command."""
    config = configs.load(run)
    given = {"images": 3, "copies": 2, "steps": 4} | changes
    settings = configs.attack_settings(config, run, given | {"whitebox": DIGEST if classifier is not None else None})
    stack, test = stacks.load(run / STACK_FILE), load_test(config.data, None)
    with opened(run, url, key, transport) as oracle:
        return attack(stack, oracle, test, settings, classifier, run / f"{settings.name}.tsv")


def without_time(path: Path) -> list[str]:
    return [line.rpartition("\t")[0] for line in path.read_text().splitlines()]


# --- what they find ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pgd", "square"])
def test_the_undefended_classifier_falls(
    server: Running, caller: Caller, undefended: Path, classifier: nn.Module, tmp_path: Path, method: str
) -> None:
    run = copied(undefended, tmp_path / "run")
    changes = {"steps": 40, "step_size": 0.2} if method == "pgd" else {"queries_per_image": 200}
    box = classifier if method == "pgd" else None
    rows = attack_here(run, server.url, caller.key, box, method=method, images=5, copies=0, **changes)
    found = summary(rows)
    assert found.clean_accuracy == 1.0
    assert found.accuracy is not None
    assert found.accuracy <= 0.5
    assert all(0.5 < row.norm <= 1 + 1e-5 for row in rows)
    assert spent_by_purpose(server, caller) == {"attack": found.queries}


def test_rows_say_what_the_oracle_says_of_the_same_draws(
    server: Running, caller: Caller, run: Path, classifier: nn.Module
) -> None:
    rows = attack_here(run, server.url, caller.key, classifier, images=6)
    header, *lines = (run / "attack-pgd-defended-1.tsv").read_text().splitlines()
    assert header == HEADER == "idx\tlabel\tclean\tattacked\tcorrect\tnorm\tqueries\tagreement\ttime"
    assert [len(line.split("\t")) for line in lines] == [9] * 6
    assert [replace(row, norm=round(row.norm, 6)) for row in rows] == read(run / "attack-pgd-defended-1.tsv")
    stack, test = stacks.load(run / STACK_FILE), load_test(configs.load(run).data, None)
    settings = configs.attack_settings(
        configs.load(run), run, {"images": 6, "copies": 2, "steps": 4, "whitebox": DIGEST}
    )
    for row in rows:
        image = test.floats(slice(row.idx, row.idx + 1))
        assert row.label == int(test.labels[row.idx])

        def predicted(images: Tensor, index: int = row.idx) -> int:
            noisy = gaussian(images.expand(2, -1, -1, -1), stack.spec.sigma, torch.Generator().manual_seed(index * 3))
            with torch.no_grad():
                return int(classifier(stack(noisy)).softmax(dim=1).mean(dim=0).argmax())

        assert row.clean == predicted(image)
        moved = image[0]
        if row.clean == row.label:
            generator = torch.Generator().manual_seed(row.idx * 3 + 1)
            moved = craft(stack, classifier, image[0], row.label, settings, generator)
        assert row.attacked == predicted(moved[None])
        assert row.norm == pytest.approx(float((moved - image[0]).norm()), abs=1e-6)
        assert row.agreement == 1.0
        assert row.queries == (4 if row.clean == row.label else 2)


def test_adaptive_is_not_the_transfer_attack(defended: Path, classifier: nn.Module) -> None:
    stack, test = stacks.load(defended / STACK_FILE), load_test(configs.load(defended).data, None)
    image, label = test.floats(slice(0, 1))[0], int(test.labels[0])

    def losses(through: str) -> tuple[float, float]:
        """Of the undefended classifier, and of the smoothed stack, at what was crafted."""
        settings = configs.AttackConfig(through=through, whitebox=DIGEST, step_size=0.2)  # type: ignore[arg-type]
        moved = craft(stack, classifier, image, label, settings, torch.Generator().manual_seed(0))[None]
        with torch.no_grad():
            noisy = gaussian(moved.expand(200, -1, -1, -1), stack.spec.sigma, torch.Generator().manual_seed(1))
            defended = -mean_log_scores(classifier(stack(noisy))[:, None])[0, label]
            return -float(classifier(moved).log_softmax(dim=1)[0, label]), float(defended)

    adaptive, transfer = losses("defended"), losses("classifier")
    assert adaptive[1] > transfer[1] + 0.1
    assert transfer[0] > adaptive[0] + 0.1


def test_more_draws_see_less_of_the_noise_and_none_see_none_of_it(server: Running, caller: Caller, run: Path) -> None:
    seen: list[Tensor] = []

    def noted(self: stacks.Stack, images: Tensor, front: Any = stacks.Stack.front) -> Tensor:
        seen.append(images)
        return front(self, images)  # type: ignore[no-any-return]

    image = load_test(configs.load(run).data, None).floats(slice(0, 1))
    for copies in (0, 200):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(stacks.Stack, "front", noted)
            folder = copied(run, run.parent / f"{copies}")
            attack_here(
                folder, server.url, caller.key, None, method="square", images=1, copies=copies, queries_per_image=600
            )
    assert torch.equal(seen[0], image)
    noisy = next(images for images in seen if len(images) == 200)
    torch.testing.assert_close(noisy.mean(dim=0), image[0], rtol=0, atol=0.1)
    assert float((noisy - image).std()) == pytest.approx(0.25, rel=0.05)


def test_a_wrong_image_is_not_attacked(server: Running, caller: Caller, run: Path, classifier: nn.Module) -> None:
    config = configs.load(run)
    settings = configs.attack_settings(config, run, {"images": 4, "copies": 2, "whitebox": DIGEST})
    test = load_test(config.data, None)
    wrong = replace(test, labels=(test.labels + 5) % 10)
    with opened(run, server.url, caller.key) as oracle:
        rows = attack(stacks.load(run / STACK_FILE), oracle, wrong, settings, classifier, run / "rows.tsv")
    missed = [row for row in rows if row.clean != row.label]
    assert missed
    assert {(row.norm, row.queries, row.correct, row.attacked - row.clean) for row in missed} == {(0.0, 2, 0, 0)}
    assert summary(missed).mean_norm is None


def test_another_classifier_is_seen_to_be_one(
    server: Running, caller: Caller, undefended: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    other = hidden(Settings()).module
    for parameter in other.parameters():
        parameter.data = torch.randn_like(parameter) / parameter[0].numel() ** 0.5
    rows = attack_here(copied(undefended, tmp_path / "run"), server.url, caller.key, other, images=10)
    agreement = summary(rows).agreement
    assert agreement is not None
    assert agreement < 0.6


def test_the_search_is_the_library_s_up_to_its_first_wrong_image(classifier: nn.Module) -> None:
    test = load_test(load_preset("standard").data, None)
    image, label = test.floats(slice(3, 4)), test.labels[3:4]

    @torch.no_grad()
    def scores(one: Tensor) -> Tensor:
        return classifier(one[None]).double().log_softmax(dim=1)[0]

    random = torch.get_rng_state()
    found = square(scores, image[0], int(label), scores(image[0]), 1.0, 301, 7)
    assert torch.equal(torch.get_rng_state(), random)
    theirs = SquareAttack(classifier, norm="L2", n_queries=300, eps=1.0, seed=7).perturb(image, label)
    torch.testing.assert_close(found.image, theirs[0], rtol=0, atol=1e-6)
    assert int(found.scores.argmax()) != int(label)


def test_a_search_that_finds_nothing_ends_at_its_least_margin() -> None:
    asked: list[float] = []

    def scores(one: Tensor) -> Tensor:
        asked.append(2.0 + float(one[0, :4].mean()))
        return torch.tensor([asked[-1], 0.0])

    image = torch.full((1, 8, 8), 0.5)
    found = square(scores, image, 0, torch.tensor([2.5, 0.0]), 1.0, 20, 0)
    assert len(asked) == 20
    assert found.scores[0] == min(asked) < 2.5
    assert scores(found.image)[0] == found.scores[0]


def test_ties_are_of_the_class_that_argmax_says() -> None:
    count = 0

    def scores(one: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return torch.zeros(3)

    image = torch.full((1, 8, 8), 0.5)
    found = square(scores, image, 0, torch.tensor([1.0, 0.0, 0.0]), 1.0, 9, 0)
    assert count == 9
    assert int(found.scores.argmax()) == 0
    count = 0
    assert isinstance(square(scores, image, 1, torch.tensor([0.0, 1.0, 0.0]), 1.0, 9, 0), Found)
    assert count == 1


# --- what they cost ---------------------------------------------------------------------------------------------------

BOTH = [{"method": "pgd"}, {"method": "square", "queries_per_image": 30}]


@pytest.mark.parametrize("changes", BOTH, ids=lambda changes: changes["method"])
def test_queries_of_the_rows_are_those_on_the_ledger(
    server: Running, caller: Caller, run: Path, classifier: nn.Module, changes: dict[str, Any]
) -> None:
    box = classifier if changes["method"] == "pgd" else None
    rows = attack_here(run, server.url, caller.key, box, images=5, **changes)
    assert all(row.queries <= changes.get("queries_per_image", 4) for row in rows)
    assert sum(row.queries for row in rows) == spent(server, caller) == QueryLog.read(run / LOG_FILE).charged["attack"]
    unfooled = [row for row in rows if row.clean == row.label == row.attacked]
    assert {row.queries for row in unfooled} <= {changes.get("queries_per_image", 4)}
    # The report does not take them for training.
    assert read_run(run).table_row["training_queries"] == 0


@pytest.mark.parametrize("changes", BOTH, ids=lambda changes: changes["method"])
def test_a_kill_in_the_middle_of_an_image_changes_and_costs_nothing(
    server: Running, run: Path, classifier: nn.Module, changes: dict[str, Any]
) -> None:
    box = classifier if changes["method"] == "pgd" else None
    whole, killed = server.caller(10**6), server.caller(10**6)
    folder = copied(run, run.parent / "whole")
    attack_here(folder, server.url, whole.key, box, **changes)
    (path,) = folder.glob("attack-*.tsv")
    for number, lost in ((4, True), (3, False), (2, True), (1, False)):
        transport = Interfering(**{"after" if lost else "before": at(number, Killed())})
        with pytest.raises(Killed):
            attack_here(run, server.url, killed.key, box, transport, **changes)
    attack_here(run, server.url, killed.key, box, **changes)
    assert without_time(run / path.name) == without_time(path)
    assert spent(server, killed) == spent(server, whole) == QueryLog.read(run / LOG_FILE).total


def test_rows_are_there_as_soon_as_they_are_known(
    server: Running, caller: Caller, undefended: Path, classifier: nn.Module, tmp_path: Path
) -> None:
    run, known = copied(undefended, tmp_path / "run"), list[int]()

    def look(number: int) -> None:
        known.append(len(read(run / "attack-pgd-classifier-1.tsv")))

    transport = Interfering(look)  # type: ignore[arg-type]
    attack_here(run, server.url, caller.key, classifier, transport, through="classifier", copies=0)
    assert known == [0, 0, 1, 1, 2, 2]


def test_going_further_keeps_the_rows_that_are_there(
    server: Running, caller: Caller, run: Path, classifier: nn.Module
) -> None:
    attack_here(run, server.url, caller.key, classifier)
    path = run / "attack-pgd-defended-1.tsv"
    before, paid = path.read_bytes(), spent(server, caller)
    path.write_bytes(before + b"3\t4")  # a torn line
    assert [row.idx for row in attack_here(run, server.url, caller.key, classifier, images=5)] == [0, 1, 2, 3, 4]
    assert path.read_bytes().startswith(before)
    assert paid < spent(server, caller) <= paid + 8
    attack_here(run, server.url, caller.key, classifier)
    assert spent(server, caller) <= paid + 8


@pytest.mark.parametrize(
    "text",
    ["idx\tlabel\n", HEADER + "\n\n", HEADER + "\n0\t1\t1\t1\t1\tfar\t4\t1.0\t0:00:01\n", HEADER + "\n0\t1\t1\t1\n"],
)
def test_a_file_of_another_form_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "attack-pgd-defended-1.tsv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"attack-pgd-defended-1\.tsv"):
        read(path)


def test_the_summary_of_nothing_and_of_something() -> None:
    assert (summary([]).clean_accuracy, summary([]).accuracy, summary([]).agreement) == (None, None, None)
    rows = [
        Row(0, 3, 3, 4, 0, 1.0, 20, 1.0),
        Row(1, 3, 3, 3, 1, 0.5, 20, 0.5),
        Row(2, 3, 5, 5, 0, 0.0, 10, 0.9),
        Row(3, 3, 3, 3, 1, 0.9, 20, float("nan")),
    ]
    found = summary(rows)
    assert (found.images, found.attacked, found.queries) == (4, 3, 70)
    assert (found.clean_accuracy, found.accuracy) == (0.75, 0.5)
    assert found.mean_norm == pytest.approx(0.8)
    assert found.agreement == pytest.approx(0.8)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ORACLE_API_KEY", "ORACLE_API_KEY_FILE", "ORACLE_URL"):
        monkeypatch.delenv(name, raising=False)


def told(*arguments: str | Path, key: str = "", code: int = 0) -> Result:
    """`defender-client attack ARGUMENTS`."""
    result = CliRunner().invoke(app, ["attack", *map(str, arguments)], env={"ORACLE_API_KEY": key})
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


def test_the_command_says_what_it_spends_and_what_it_found(
    server: Running, caller: Caller, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--run", run, "--oracle", server.url, "--images", "4", "--copies", "2")
    first = told(*few, "--whitebox", WEIGHTS, "--steps", "5", "--record", key=caller.key)
    assert "this attack will spend at most 16 queries (1,000,000 left)" in first.stderr
    assert "the white box names the oracle's class for 100.0% of the clean draws" in first.stdout
    assert "transfer" not in first.stdout
    monkeypatch.setattr(printing, "_SAME_CLASSIFIER", 1.01)
    rows = read(run / "attack-pgd-defended-1.tsv")
    accuracies = f"{summary(rows).clean_accuracy:.3f}", f"{summary(rows).accuracy:.3f}"
    assert all(accuracy in first.stdout for accuracy in accuracies)
    paid = spent(server, caller)

    assert "a transfer" in told(*few, "--whitebox", WEIGHTS, "--steps", "5", key=caller.key).stdout
    again = told(*few, "--whitebox", WEIGHTS, "--steps", "5", "--json", key=caller.key)
    assert "will spend" not in again.stderr
    answer = json.loads(again.stdout)
    assert (answer["images"], answer["queries"], answer["accuracy"]) == (4, paid, summary(rows).accuracy)
    assert (answer["settings"]["seed"], answer["settings"]["steps"]) == (configs.load(run).seed, 5)
    assert answer["path"] == str(run / "attack-pgd-defended-1.tsv")
    assert spent(server, caller) == paid

    folder = copied(run, run.parent / "again")
    replayed = told(
        *("--run", folder, "--replay", run, "--images", "4", "--copies", "2", "--steps", "5", "--whitebox", WEIGHTS)
    )
    assert "zero queries" in replayed.stderr
    assert without_time(folder / "attack-pgd-defended-1.tsv") == without_time(run / "attack-pgd-defended-1.tsv")

    squared = told(*few, "--method", "square", "--queries-per-image", "20", "--json", key=caller.key)
    assert "at most 80 queries" in squared.stderr
    assert json.loads(squared.stdout)["agreement"] is None


def test_what_the_budget_does_not_cover_is_not_begun(server: Running, run: Path) -> None:
    poor = server.caller(59)
    few = ("--run", run, "--oracle", server.url, "--images", "3", "--copies", "2", "--method", "square")
    refused = told(*few, "--queries-per-image", "20", key=poor.key, code=3)
    assert "the attack needs 60 queries and the budget has 59 left" in refused.stderr
    assert spent(server, poor) == 0
    assert not list(run.glob("attack-*"))
    # An image that was begun counts with what is left of it.
    dying = Interfering(after=at(2, Killed()))
    with pytest.raises(Killed):
        attack_here(run, server.url, poor.key, None, dying, method="square", queries_per_image=20, steps=40)
    begun = spent(server, poor)
    assert 0 < begun <= 4
    last = told(*few, "--queries-per-image", "20", key=poor.key, code=3)
    assert f"the attack needs {60 - begun} queries and the budget has {59 - begun} left" in last.stderr


def test_other_settings_for_the_same_rows_are_refused(server: Running, caller: Caller, run: Path) -> None:
    few = ("--run", run, "--oracle", server.url, "--copies", "1", "--whitebox", WEIGHTS, "--steps", "2")
    told(*few, "--images", "1", key=caller.key)
    for change in (("--seed", "8"), ("--copies", "2")):
        refused = told(*few, "--images", "1", *change, key=caller.key, code=2)
        assert f"{change[0][2:]}: " in refused.stderr
        assert "move its attack-pgd-defended-1.tsv and attack-pgd-defended-1.json away" in refused.stderr
    told(*few, "--images", "2", key=caller.key)
    # What was not said again is as it was.
    told("--run", run, "--oracle", server.url, "--whitebox", WEIGHTS, "--images", "2", key=caller.key)
    assert len(read(run / "attack-pgd-defended-1.tsv")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a copy of the classifier (--whitebox), or use --method square"),
        (("--method", "square", "--whitebox", WEIGHTS), "leave --whitebox and --through out"),
        (("--method", "square", "--through", "classifier"), "leave --whitebox and --through out"),
        (("--method", "square", "--queries-per-image", "29"), "must be at least 30, not 29"),
        (("--whitebox", WEIGHTS, "--queries-per-image", "19"), "must be at least 20, not 19"),
        (("--method", "magic"), "method: Input should be 'pgd' or 'square'"),
        (("--whitebox", WEIGHTS, "--epsilon", "0"), "epsilon: "),
        (("--whitebox", WEIGHTS, "--copies", "1001"), "copies: "),
        (("--whitebox", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_asked(run: Path, arguments: tuple[str, ...], message: str) -> None:
    refused = told("--run", run, "--oracle", "http://127.0.0.1:9", *arguments, code=2)
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_the_missing_library_and_images_too_small_for_it_are_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack.square", None)
    refused = told("--run", run, "--oracle", "http://127.0.0.1:9", "--method", "square", code=2)
    assert "pip install 'zo-defense[attacks]'" in refused.stderr
    assert not list(run.glob("attack-*"))
    with pytest.raises(ConfigError, match="5 x 5"):
        check_size((1, 4, 8))


def test_pgd_needs_its_white_box(run: Path, server: Running, caller: Caller) -> None:
    settings = configs.attack_settings(configs.load(run), run, {"whitebox": DIGEST})
    stack, test = stacks.load(run / STACK_FILE), load_test(configs.load(run).data, None)
    with opened(run, server.url, caller.key) as oracle, pytest.raises(ValueError, match="white box"):
        attack(stack, oracle, test, settings, None, run / "rows.tsv")


def test_a_stack_that_is_not_the_run_s_is_refused(run: Path, undefended: Path) -> None:
    attacked = ("--run", run, "--oracle", "http://127.0.0.1:9", "--whitebox", WEIGHTS)
    shutil.copy(undefended / STACK_FILE, run / STACK_FILE)
    assert "autoencoder (it has none)" in told(*attacked, code=2).stderr
