"""Certification over HTTP: the file, what it costs, and that a kill changes neither."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from defender_support import (
    Interfering,
    Killed,
    Trained,
    at,
    certify_here,
    opened,
    spent,
    spent_by_purpose,
    tiny,
    train_here,
)
from oracle_support import Caller, Running
from torch import nn

from defender_client import config as configs
from defender_client import stack as stacks
from defender_client.certify import CERTIFIED_FILE, HEADER, Row, certified_accuracy, certify, read
from defender_client.config import CERTIFY_FILE, ConfigError, load_preset
from defender_client.data import load_test
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.smoothing import Smooth, largest_radius
from defender_client.train import STACK_FILE

LINE = re.compile(r"\d+\t\d\t(-1|\d)\t\d+\.\d{6}\t[01]\t\d:\d\d:\d\d(\.\d{6})?")


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A trained run that is not certified yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (configs.CONFIG_FILE, STACK_FILE):
        shutil.copy(trained.run / name, folder / name)
    return folder


def without_time(path: Path) -> list[str]:
    return [line.rpartition("\t")[0] for line in path.read_text().splitlines()]


def test_a_row_an_image_in_the_form_the_literature_reads(trained: Trained) -> None:
    header, *lines = (trained.run / CERTIFIED_FILE).read_text().splitlines()
    assert header == "idx\tlabel\tpredict\tradius\tcorrect\ttime"
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    labels = load_test(trained.config.data, None).labels
    rows = read(trained.run / CERTIFIED_FILE)
    assert [row.idx for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row.label == int(labels[row.idx])
        assert row.correct == (row.predict == row.label)
        assert 0 <= row.radius <= largest_radius(100, 0.001, 0.25)
        assert row.radius > 0 or row.predict == -1


def test_the_rows_are_those_of_the_same_stack_in_front_of_a_local_classifier(
    server: Running, caller: Caller, run: Path, trained: Trained, classifier: nn.Module
) -> None:
    rows = certify_here(trained.config, run, server.url, caller.key)
    stack, test = stacks.load(run / STACK_FILE), load_test(trained.config.data, None)
    assert stack.denoiser is not None
    assert stack.autoencoder is not None
    smooth = Smooth(lambda images: classifier(stack(images)), 10, 0.25)
    for row in rows:
        generator = torch.Generator().manual_seed(row.idx)
        certificate = smooth.certify(test.floats(slice(row.idx, row.idx + 1))[0], 10, 100, 0.001, 1000, generator)
        assert row.predict == certificate.label
        # Rounded down, by less than a millionth.
        assert 0 <= certificate.radius - row.radius < 1e-6
    assert spent(server, caller) == 4 * 110
    assert spent_by_purpose(server, caller) == {"certify": 4 * 110}


def test_the_stack_is_what_its_file_says(server: Running, caller: Caller, run: Path, trained: Trained) -> None:
    """Denoiser, autoencoder and sigma come from the file; no configuration can leave them out."""
    other = load_preset("standard", ["sigma=0.9", "certify.n0=10", "certify.n=100", "certify.images=4"])
    certify_here(other, run, server.url, caller.key)
    assert without_time(run / CERTIFIED_FILE) == without_time(trained.run / CERTIFIED_FILE)


def test_the_same_seed_is_the_same_noise_for_every_stack(
    server: Running, caller: Caller, run: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[torch.Tensor]] = []
    front = stacks.Stack.front

    def noted(self: stacks.Stack, images: torch.Tensor) -> torch.Tensor:
        seen[-1].append(images)
        return front(self, images)

    undefended = load_preset("standard", ["certify.n0=10", "certify.n=100", "certify.images=4"])
    train_here(undefended, tmp_path / "undefended", server.url, caller.key)
    monkeypatch.setattr(stacks.Stack, "front", noted)
    for config, folder in ((trained.config, run), (undefended, tmp_path / "undefended")):
        seen.append([])
        certify_here(config, folder, server.url, caller.key)
    assert torch.equal(torch.cat(seen[0]), torch.cat(seen[1]))
    assert len(torch.cat(seen[0])) == 440


def test_a_kill_in_the_middle_of_an_image_changes_and_costs_nothing(
    server: Running, caller: Caller, run: Path, trained: Trained
) -> None:
    for number, lost in ((4, True), (3, False), (2, True), (1, False)):
        transport = Interfering(**{"after" if lost else "before": at(number, Killed())})
        with pytest.raises(Killed):
            certify_here(trained.config, run, server.url, caller.key, transport)
    assert len(read(run / CERTIFIED_FILE)) == 2
    certify_here(trained.config, run, server.url, caller.key)
    assert without_time(run / CERTIFIED_FILE) == without_time(trained.run / CERTIFIED_FILE)
    assert spent(server, caller) == QueryLog.read(run / LOG_FILE).total == 440


def test_rows_are_there_as_soon_as_they_are_known(server: Running, caller: Caller, run: Path, trained: Trained) -> None:
    known = []

    def look(number: int) -> None:
        known.append(len(read(run / CERTIFIED_FILE)))

    certify_here(trained.config, run, server.url, caller.key, Interfering(look))  # type: ignore[arg-type]
    assert known == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_last_line_cut_at_any_byte_is_certified_again_for_free(
    server: Running, caller: Caller, run: Path, trained: Trained
) -> None:
    settings, test = trained.config.certify, load_test(trained.config.data, None)
    path = run / CERTIFIED_FILE
    with opened(run, server.url, caller.key) as oracle:
        stack = stacks.load(run / STACK_FILE)
        certify(stack, oracle, test, settings, 0, path)
        whole = path.read_bytes()
        start = whole[:-1].rfind(b"\n") + 1
        for cut in (*range(start, len(whole), 5), len(whole) - 1, 3, 0):
            path.write_bytes(whole[:cut])
            rows = certify(stack, oracle, test, settings, 0, path)
            assert without_time(path) == without_time(trained.run / CERTIFIED_FILE)
            assert [row.idx for row in rows] == [0, 1, 2, 3]
    assert spent(server, caller) == 440


def test_a_kill_at_the_start_of_a_resumed_certification_loses_no_row(
    server: Running, caller: Caller, run: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(trained.run / CERTIFIED_FILE, run)
    with (run / CERTIFIED_FILE).open("ab") as torn:
        torn.write(b"4\t")
    config = trained.config.model_copy(update={"certify": trained.config.certify.model_copy(update={"images": 5})})
    opening = Path.open

    def dying(self: Path, mode: str = "r", *arguments: object, **options: object) -> object:
        if self.name == CERTIFIED_FILE and mode.startswith("a"):
            raise Killed
        return opening(self, mode, *arguments, **options)  # type: ignore[call-overload]

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", dying)
        with pytest.raises(Killed):
            certify_here(config, run, server.url, caller.key)
    assert (run / CERTIFIED_FILE).read_bytes() == (trained.run / CERTIFIED_FILE).read_bytes()


def test_going_further_keeps_the_rows_that_are_there(
    server: Running, caller: Caller, run: Path, trained: Trained
) -> None:
    config = trained.config
    certify_here(config, run, server.url, caller.key)
    before = (run / CERTIFIED_FILE).read_bytes()
    more = config.model_copy(update={"certify": config.certify.model_copy(update={"images": 6})})
    (run / CERTIFY_FILE).unlink()
    certify_here(more, run, server.url, caller.key)
    assert (run / CERTIFIED_FILE).read_bytes().startswith(before)
    assert [row.idx for row in read(run / CERTIFIED_FILE)] == [0, 1, 2, 3, 4, 5]
    assert spent(server, caller) == 6 * 110
    certify_here(config, run, server.url, caller.key)
    assert spent(server, caller) == 6 * 110


def test_more_images_than_there_are_is_all_of_them(
    server: Running, caller: Caller, run: Path, trained: Trained
) -> None:
    test = load_test(trained.config.data, None).subset(slice(0, 2))
    with opened(run, server.url, caller.key) as oracle:
        stack = stacks.load(run / STACK_FILE)
        for images in (0, 99):
            settings = trained.config.certify.model_copy(update={"images": images})
            assert len(certify(stack, oracle, test, settings, 0, run / CERTIFIED_FILE)) == 2


@pytest.mark.parametrize(
    "text",
    [
        "idx\tlabel\n",
        HEADER + "\n\n",
        HEADER + "\n0\t1\t1\n",
        HEADER + "\n0\t1\t1\tfar\t1\t0:00:01\n",
        "\n" + HEADER + "\n",
        b"\xff\xfe\n",
    ],
)
def test_a_file_of_another_form_is_told(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / CERTIFIED_FILE
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=r"certified.tsv"):
        read(path)


def test_certified_accuracy_counts_what_is_right_and_far_enough() -> None:
    right, wrong = Row(0, 3, 3, 0.5, 1), Row(1, 3, 4, 0.9, 0)
    abstained = replace(wrong, idx=2, predict=-1, radius=0.0)
    rows = [right, wrong, abstained, replace(right, idx=3, radius=0.25)]
    assert [certified_accuracy(rows, r) for r in (0, 0.25, 0.26, 0.5, 0.51)] == [0.5, 0.5, 0.25, 0.25, 0]
    assert certified_accuracy([], 0.5) != certified_accuracy([], 0.5)  # NaN


def test_a_refused_change_of_n_is_told(run: Path) -> None:
    config = tiny(run.parent)
    configs.save_certify_settings(config.certify, run)
    with pytest.raises(ConfigError, match="n: 100 -> 200"):
        configs.certify_settings(config, run, {"n": 200})
