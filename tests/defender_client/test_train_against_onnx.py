"""The defender trains against an ONNX file as against any classifier: it cannot tell."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from defender_support import MAX_ROWS, tiny, train_here
from oracle_support import running

from defender_client.train import STACK_FILE
from oracle_server.loading import load_classifier
from oracle_server.settings import Settings


def test_a_run_against_an_onnx_file(tmp_path: Path) -> None:
    module, path = load_classifier(Settings()).module, tmp_path / "digits.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.zeros(2, 1, 8, 8),), str(path), dynamo=False, input_names=["x"], verbose=False,
            dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    settings = Settings(model=str(path), ledger=str(tmp_path / "ledger.db"), max_batch_rows=MAX_ROWS)
    config, run = tiny(tmp_path, "train.epochs=1", "data.train_images=32"), tmp_path / "run"
    with running(settings) as server:
        caller = server.caller(10**6)
        train_here(config, run, server.url, caller.key)
        assert caller.budget()["spent"] > 0
    assert (run / STACK_FILE).is_file()
