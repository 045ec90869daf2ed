from __future__ import annotations

import json
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from oracle_server.engines import BlockEngine, build_block_engine, build_engine, choice
from oracle_server.engines.crew import Crew
from oracle_server.loading import Classifier
from oracle_server.settings import Settings
from shared.models.classifiers import SmallCNN
from shared.models.weight_files import ModelError


@pytest.fixture
def small() -> Classifier:
    torch.manual_seed(0)
    return Classifier(SmallCNN(1, 3, width=4).eval().requires_grad_(False), (1, 8, 8), 3)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORACLE_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def measured(said: pytest.LogCaptureFixture) -> bool:
    """Whether the last engine built was measured, or remembered; the log is cleared."""
    lines = [record.getMessage() for record in said.records if record.getMessage().startswith("engine")]
    said.clear()
    return "measured in" in lines[-1]


def test_a_second_start_remembers(folder: Path, small: Classifier, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    images = torch.rand(5, 1, 8, 8)
    first = build_engine(small, Settings())
    assert measured(caplog)
    second = build_engine(small, Settings())
    assert not measured(caplog)
    assert isinstance(first, BlockEngine)
    assert isinstance(second, BlockEngine)
    assert (second.name, second.ladder) == (first.name, first.ladder)
    assert torch.equal(first(images), second(images))
    assert [path.suffix for path in folder.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: (c, Settings(engine="eager", engine_block=8)),
        lambda c: (c, Settings(engine="compile", engine_block=4)),
        lambda c: (c.module.linear.weight.data.add_(1e-6), (c, Settings(engine="eager", engine_block=4)))[1],
    ],
    ids=["block", "engine", "weights"],
)
def test_what_changes_the_answers_is_measured_anew(  # type: ignore[no-untyped-def]
    change, folder: Path, small: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    build_engine(small, Settings(engine="eager", engine_block=4))
    assert measured(caplog)
    build_engine(*change(small))
    assert measured(caplog)


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b'{"engine": "warp"}', None], ids=repr)
def test_a_damaged_cache_is_measured_anew(
    content: bytes | None, folder: Path, small: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    build_engine(small, Settings(engine="eager", engine_block=4))
    (file,) = folder.iterdir()
    if content is None:
        content = json.dumps(json.loads(file.read_text()) | {"sizes": []}).encode()
    file.write_bytes(content)
    caplog.clear()
    build_engine(small, Settings(engine="eager", engine_block=4))
    assert measured(caplog)


def test_servers_that_start_together_take_one_choice(
    folder: Path, small: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    """They would measure at the same time, and could choose differently."""
    caplog.set_level(logging.INFO)
    together = threading.Barrier(2)

    def build() -> None:
        together.wait()
        build_engine(small, Settings(engine="eager", engine_block=4))

    with ThreadPoolExecutor(2) as pool:
        for started in [pool.submit(build) for _ in range(2)]:
            started.result()
    assert caplog.text.count("measured in") == 1
    assert caplog.text.count("measured at an earlier start") == 1


def test_a_cache_that_cannot_be_written_is_no_error(small: Classifier, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    build_engine(small, Settings(engine="eager", engine_block=4, engine_cache=tmp_path / "file"))
    build_engine(small, Settings(engine="eager", engine_block=4, engine_cache=tmp_path / "file" / "below"))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("missing", ["onnxruntime", "onnx"])
def test_without_onnxruntime(
    missing: str, small: Classifier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModelError, match=rf"'{missing}' is not installed: pip install 'zo-defense\[onnxruntime\]'"):
        build_engine(small, Settings(engine="onnxruntime"))
    engine = build_engine(small, Settings(engine_block=4))
    assert isinstance(engine, BlockEngine)
    assert engine.name in ("eager", "compile")
    assert f"onnxruntime is not a candidate: the package '{missing}'" in caplog.text


class Branching(nn.Module):
    """What torch.fx cannot trace."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :2] * (1.0 if images.sum() > 0 else 2.0)


@pytest.mark.usefixtures("folder")
def test_what_cannot_be_traced_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    odd = Classifier(Branching(), (1, 2, 2), 2)
    with pytest.raises(ModelError, match=r"--engine compile: torch.fx cannot trace it"):
        build_engine(odd, Settings(engine="compile"))
    assert build_engine(odd, Settings(engine_block=4))(torch.rand(3, 1, 2, 2)).shape == (3, 2)
    assert "engine compile is not a candidate: torch.fx cannot trace it" in caplog.text


def test_only_engines_near_eager_may_win(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def slow(rows: Tensor) -> Tensor:
        torch.rand(2_000).sort()
        return rows + 0.0

    makers = {
        "eager": lambda: slow,
        "wrong": lambda: lambda rows: rows + 2e-4,
        "nan": lambda: lambda rows: rows + float("nan"),
        "near": lambda: lambda rows: rows + 5e-5,
    }
    chosen = choice.choose(makers, (3,), Crew(2), 8, None)
    assert chosen.engine.name == "near"
    assert set(chosen.rates) == {"eager", "near"}
    assert chosen.difference == pytest.approx(5e-5, rel=0.01)
    assert "engine wrong differs from eager by 2.0e-04, more than 1e-04: not a candidate" in caplog.text
    assert "engine nan differs" in caplog.text
    assert choice.choose(makers, (3,), Crew(2), 8, "wrong").engine.name == "wrong"
    assert caplog.records[-1].levelname == "WARNING"


@pytest.mark.usefixtures("folder")
def test_bfloat16_only_when_asked_and_with_a_warning(small: Classifier, caplog: pytest.LogCaptureFixture) -> None:
    images = torch.rand(4, 1, 8, 8)
    exact = build_engine(small, Settings(engine="eager", engine_block=4, device="cpu"))(images)
    assert not caplog.records
    rough = build_engine(small, Settings(engine="eager", engine_block=4, device="cpu", precision="bfloat16"))(images)
    assert "finite differences" in caplog.text
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(device="cpu", tf32=True), "--tf32 is CUDA's"),
        (Settings(device="cpu", precision="bfloat16", engine="onnxruntime"), "float32 on the CPU"),
    ],
    ids=["tf32", "bfloat16"],
)
def test_what_does_not_go_together_is_refused(settings: Settings, said: str, small: Classifier) -> None:
    with pytest.raises(ModelError, match=said):
        build_engine(small, settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device(small: Classifier) -> None:
    with pytest.raises(ModelError, match="no CUDA device"):
        build_engine(small, Settings(device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_on_cuda(engine: str, small: Classifier) -> None:
    built = build_engine(small, Settings(device="cuda", engine=engine))  # type: ignore[arg-type]
    images = torch.rand(300, 1, 8, 8)
    answers = built(images)
    torch.testing.assert_close(answers, small.module(images), rtol=0, atol=1e-4)
    assert torch.equal(built(images[17:18]), answers[17:18])


def test_each_thread_computes_on_one_core_and_other_threads_as_before() -> None:
    before = torch.get_num_threads()
    found: list[int] = []
    Crew(3).everywhere(lambda: found.append(torch.get_num_threads()))
    assert found == [1, 1, 1]
    assert torch.get_num_threads() == before


def test_a_failure_reaches_the_caller_and_the_next_call_works() -> None:
    class Fragile(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            if rows.min() < 0:
                raise RuntimeError("negative")
            return rows * 2

    engine = build_block_engine(Fragile(), (2,), most=4)
    with pytest.raises(RuntimeError, match="negative"):
        engine(-torch.ones(9, 2))
    assert torch.equal(engine(torch.ones(9, 2)), 2 * torch.ones(9, 2))
