"""A run's stack for other programs: the same images out of each file, and a manifest that says what they are."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from defender_support import Trained
from torch import Tensor
from typer.testing import CliRunner

from defender_client import config as configs
from defender_client import stack as stacks
from defender_client.certify import CERTIFIED_FILE, certified_accuracy, read
from defender_client.cli import app
from defender_client.config import ConfigError
from defender_client.export import _write_onnx, _write_program, export_stack
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.train import STACK_FILE
from shared.models.autoencoder import principal, pyramid
from shared.models.denoisers import DenoiserSpec
from shared.models.manifest import MANIFEST_FILE, Manifest, load_exported
from shared.models.stack import Stack, StackSpec

SHAPE = (1, 8, 8)
SPECS = {
    "unet and pyramid": (DenoiserSpec(architecture="unet", depth=2, width=4), pyramid(SHAPE, 8, 8)),
    "dncnn": (DenoiserSpec(architecture="dncnn", depth=3, width=8), None),
    "components": (DenoiserSpec(architecture="none"), principal(SHAPE, 9)),
}


def noisy(rows: int) -> Tensor:
    """Images beyond [0, 1], as smoothing asks about."""
    return torch.rand(rows, *SHAPE, generator=torch.Generator().manual_seed(rows)) * 2 - 0.5


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    pytest.importorskip("onnx")
    out = tmp_path_factory.mktemp("exported") / "stack"
    return out, export_stack(trained.run, out)


@pytest.mark.parametrize("name", SPECS)
def test_each_program_computes_what_the_stack_computes(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    denoiser, autoencoder = SPECS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        stack = Stack(
            StackSpec(image_shape=SHAPE, classes=10, sigma=0.5, denoiser=denoiser, autoencoder=autoencoder)
        ).eval()
        for parameter in stack.parameters():  # also of layers that begin at zero
            torch.nn.init.normal_(parameter, std=0.3)
    _write_program(stack, tmp_path / "stack.pt2")
    _write_onnx(stack, tmp_path / "stack.onnx")
    program = torch.export.load(tmp_path / "stack.pt2").module()
    session = runtime.InferenceSession(tmp_path / "stack.onnx")
    for rows in (1, 2, 33):  # 2 is the example's
        images = noisy(rows)
        with torch.no_grad():
            expected, found = stack(images), program(images)
        assert float((expected - images.clamp(0, 1)).abs().max()) > 0.05, "the stack does nothing"
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, atol=1e-5)


def test_the_files_hold_the_runs_stack(exported: tuple[Path, Manifest], trained: Trained) -> None:
    out, manifest = exported
    stack = stacks.load(trained.run / STACK_FILE)
    loaded, read_back = load_exported(out)
    assert read_back == manifest
    images = noisy(5)
    with torch.no_grad():
        expected = stack(images)
        assert torch.equal(loaded(images), expected)
        np.testing.assert_allclose(torch.export.load(out / "stack.pt2").module()(images), expected, atol=1e-6)


def test_the_manifest_says_what_was_exported(exported: tuple[Path, Manifest], trained: Trained) -> None:
    out, _ = exported
    said = json.loads((out / MANIFEST_FILE).read_text())
    assert set(said["files"]) == {"stack.safetensors", "stack.pt2", "stack.onnx"}
    assert sorted(path.name for path in out.iterdir()) == sorted([*said["files"], MANIFEST_FILE])
    for name, entry in said["files"].items():
        content = (out / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert (said["image_shape"], said["classes"], said["sigma"]) == ([1, 8, 8], 10, 0.25)
    assert (said["task"], said["preset"]) == ("classification", "tiny")
    assert said["versions"]["torch"] == torch.__version__
    log = QueryLog.read(trained.run / LOG_FILE)
    assert said["queries"] == dict(log.charged)
    assert said["total_queries"] == log.total > 0
    rows = read(trained.run / CERTIFIED_FILE)
    certified = said["certification"]
    assert (certified["images"], certified["n0"], certified["n"]) == (len(rows), 10, 100)
    assert certified["accuracy"]["0.25"] == certified_accuracy(rows, 0.25)
    assert certified["abstained"] == sum(row.predict == -1 for row in rows)


def test_nothing_in_the_files_is_pickled(exported: tuple[Path, Manifest]) -> None:
    with zipfile.ZipFile(exported[0] / "stack.pt2") as archive:
        assert not [name for name in archive.namelist() if archive.read(name)[:2] == b"PK"]
        (config,) = [name for name in archive.namelist() if name.endswith("model_weights_config.json")]
        entries = json.loads(archive.read(config))["config"].values()
        assert entries
        assert not any(entry["use_pickle"] for entry in entries)


def test_the_command_writes_the_formats_asked_for_and_no_others(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stack.onnx").write_bytes(b"of an export before")
    result = CliRunner().invoke(app, ["export", str(trained.run), "--out", str(out), "--format", "safetensors"])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST_FILE, "stack.safetensors"]
    digest = hashlib.sha256((out / "stack.safetensors").read_bytes()).hexdigest()
    assert digest in result.output
    shown = CliRunner().invoke(
        app, ["export", str(trained.run), "--out", str(out), "--format", "safetensors", "--json"]
    )
    assert json.loads(shown.output)["files"]["stack.safetensors"]["sha256"] == digest


def test_what_cannot_be_exported_is_said(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose from safetensors, torch-export, onnx"):
        export_stack(trained.run, tmp_path / "out", ["pickle"])
    run = tmp_path / "run"
    configs.save(trained.config, run)
    with pytest.raises(ConfigError, match="has no stack yet"):
        export_stack(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
