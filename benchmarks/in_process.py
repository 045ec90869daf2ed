"""The same classifier in a process of its own, without a server: what serving is compared with.

    python -m benchmarks.in_process KIND --model-file FILE --images FILE [...]

A worker (see `measuring.obey`). Kinds: `engine`, the oracle's own; `eager`, plain PyTorch; `onnxruntime`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Answer = Callable[[np.ndarray], np.ndarray]

TOLERANCE = 1e-4  # between backends; measured differences are below 2e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(_KINDS))
    parser.add_argument("--model-file", type=Path, required=True, help="Of `models.write`.")
    parser.add_argument("--images", type=Path, required=True, help="npy, float32 [n, 3, 32, 32]: one batch.")
    parser.add_argument("--expected", type=Path, help="npy, its logits.")
    parser.add_argument("--malloc", choices=["kept", "default"], default="kept", help="kept: as our programs set it.")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.malloc == "kept":
        from shared.process import prepare

        prepare()
    import numpy as np

    from benchmarks.measuring import Work, obey

    def make_ready() -> tuple[Work, str]:
        answer, what = _KINDS[options.kind](options)
        images = np.load(options.images)
        check(answer(images), options.expected)

        def work(batches: int) -> None:
            for _ in range(batches):
                answer(images)

        return work, what

    obey(make_ready)


def check(logits: np.ndarray, expected: Path | None) -> None:
    """SystemExit unless these are the expected logits: a candidate that computes something else is no candidate."""
    import numpy as np

    if expected is None:
        return
    wanted = np.load(expected)
    if logits.shape != wanted.shape:
        raise SystemExit(f"Error: logits {logits.shape}, expected {wanted.shape}")
    error = float(np.abs(logits - wanted).max())
    if not error <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise SystemExit(f"Error: its logits are wrong by up to {error:.2g}")


def _engine(options: argparse.Namespace) -> tuple[Answer, str]:
    import torch

    from benchmarks import models
    from oracle_server.engines import build_engine
    from oracle_server.loading import Classifier
    from oracle_server.settings import Settings

    settings = Settings(engine=options.engine, device=options.device, engine_block=options.block)
    classifier = Classifier(models.load(options.model_file), models.IMAGE_SHAPE, models.CLASSES)
    engine = build_engine(classifier, settings)

    def answer(images: np.ndarray) -> np.ndarray:
        logits: np.ndarray = engine(torch.from_numpy(images)).numpy()
        return logits

    return answer, str(getattr(engine, "name", type(engine).__name__))  # not every engine has one


def _eager(options: argparse.Namespace) -> tuple[Answer, str]:
    import torch

    from benchmarks import models
    from oracle_server.cpus import usable_cpus

    torch.set_num_threads(usable_cpus())
    module = models.load(options.model_file)

    def answer(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = module(torch.from_numpy(images)).numpy()
        return logits

    return answer, f"torch {torch.__version__}"


def _onnxruntime(options: argparse.Namespace) -> tuple[Answer, str]:
    import tempfile

    import numpy as np
    import onnxruntime
    import torch

    from benchmarks import models
    from oracle_server.cpus import usable_cpus

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        batch = torch.from_numpy(np.load(options.images))
        module = models.load(options.model_file)
        torch.onnx.export(module, (batch,), path, input_names=["images"], output_names=["logits"])
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = usable_cpus()
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

    def answer(images: np.ndarray) -> np.ndarray:
        logits: np.ndarray = session.run(["logits"], {"images": images})[0]
        return logits

    return answer, f"onnxruntime {onnxruntime.__version__}"


_KINDS = {"engine": _engine, "eager": _eager, "onnxruntime": _onnxruntime}


if __name__ == "__main__":
    main()
