"""Which stack a run keeps: the best by the validation split, a part of the training set. The test set is not read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from defender_support import RGE, Killed, Trained, same_tensors, tiny, train_here
from oracle_support import Caller, Running
from torch import Tensor, nn
from torch.nn import functional as F

from defender_client import stack as stacks
from defender_client import train as training
from defender_client.data import gaussian, load_splits
from defender_client.estimation import StepResult
from defender_client.jobs import train_and_certify_job, train_job
from defender_client.labels import LABELS_FILE
from defender_client.plan import Plan
from defender_client.pretrain import PRETRAINED_FILE
from defender_client.sources import LiveOracle
from defender_client.train import CURVE_FILE, STACK_FILE
from shared import datasets
from shared.datasets import ImageSet, Split


def ignore(planned: Plan) -> None:
    pass


def test_training_never_reads_the_test_set(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it matter to the stack what is in it, where a job has it at hand for what comes after."""
    load, asked = datasets.load, list[Split]()

    def poisoned(name: str, data: Path | None, split: Split, *, image_size: int | None = None) -> ImageSet:
        asked.append(split)
        if split == "test":
            raise AssertionError("the test set was read")
        return load(name, data, split, image_size=image_size)

    def inverted(name: str, data: Path | None, split: Split, *, image_size: int | None = None) -> ImageSet:
        found = load(name, data, split, image_size=image_size)
        return found if split == "train" else replace(found, images=255 - found.images, labels=(found.labels + 1) % 10)

    without, inverse = tmp_path / "without", tmp_path / "inverse"
    config = tiny(tmp_path, "data.train_images=32")
    monkeypatch.setattr(datasets, "load", poisoned)
    train_job(config, without, None, LiveOracle(server.url, server.caller(10**6).key), ignore)
    assert asked == ["train"]
    monkeypatch.setattr(datasets, "load", inverted)
    source = LiveOracle(server.url, server.caller(10**6).key)
    rows = train_and_certify_job(config, inverse, None, source, ignore).rows
    assert [row.label for row in rows] == ((load("digits", None, "test").labels[:4] + 1) % 10).tolist()
    for name in (PRETRAINED_FILE, LABELS_FILE, STACK_FILE):
        assert same_tensors(inverse / name, without / name), name
    assert (inverse / CURVE_FILE).read_bytes() == (without / CURVE_FILE).read_bytes()


@torch.no_grad()
def test_what_the_curve_says_is_measured_on_the_validation_split(trained: Trained, classifier: nn.Module) -> None:
    """The kept stack's line again, in front of a local classifier: against the classifier's own labels, under noise."""
    stack, config = stacks.load(trained.run / STACK_FILE), trained.config
    clean = load_splits(config.data, None, config.seed).validation.floats(slice(None))
    logits = classifier(stack(gaussian(clean, config.sigma, torch.Generator().manual_seed(config.seed))))
    targets = classifier(clean).argmax(1)
    curve = [json.loads(line) for line in (trained.run / CURVE_FILE).read_text().splitlines()]
    best = max(curve, key=lambda point: (point["agreement"], point["epoch"]))
    assert best["agreement"] == int((logits.argmax(1) == targets).sum()) / 16
    assert best["loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-4)


@pytest.mark.parametrize(("agreements", "kept"), [((0.3, 0.9, 0.5), 1), ((0.5, 0.9, 0.9), 2)], ids=str)
def test_the_stack_that_agrees_best_is_kept_and_not_the_last(
    server: Running,
    caller: Caller,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    agreements: tuple[float, ...],
    kept: int,
) -> None:
    """Of several, the last; and also where the run was killed between the best and the last."""
    seen: dict[int, dict[str, Tensor]] = {}
    validate = training._Trainer._validate

    def said(trainer: training._Trainer, epoch: int) -> StepResult:
        result = validate(trainer, epoch)
        known = epoch in seen
        seen[epoch] = {name: tensor.clone() for name, tensor in trainer._stack.state_dict().items()}
        if epoch == 2 and not known:
            raise Killed
        return replace(result, agreement=agreements[epoch])

    monkeypatch.setattr(training._Trainer, "_validate", said)
    config = tiny(tmp_path, *RGE, "data.train_images=32", "train.epochs=3")
    with pytest.raises(Killed):
        train_here(config, tmp_path / "run", server.url, caller.key)
    found = train_here(config, tmp_path / "run", server.url, caller.key).state_dict()
    assert [
        epoch for epoch, weights in seen.items() if all(torch.equal(weights[name], found[name]) for name in found)
    ] == [kept]
    curve = [json.loads(line) for line in (tmp_path / "run" / CURVE_FILE).read_text().splitlines()]
    assert [point["agreement"] for point in curve] == list(agreements)
