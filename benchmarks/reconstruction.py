"""The paper's reconstruction figure over HTTP (Zhang et al., ICLR 2022, section 5.2), one command.

    python -m benchmarks.reconstruction --out OUT --data MNIST_DIR [--weights FILE] [--scale cpu]

Starts an oracle that hides a reconstructor (trained first, without --weights), defends it by FO-DS, ZO-DS, FO-AE-DS and
ZO-AE-DS with a client and a budget each, and attacks all of them and the undefended one in an l2 ball: with images
crafted on the undefended reconstructor, as the paper's code does, and adaptively, through the whole defended pipeline.
Writes `reconstruction.md`, `reconstruction.json` and the figure with its six panels, `reconstruction.png`. Interrupted,
the same command goes on where it stopped; run again, it asks nothing for what is done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measuring import ROOT, Failed, heading, table

if TYPE_CHECKING:
    from defender_client.config import RunConfig

SCALES = ("smoke", "cpu", "full")
ROUTES = ("classifier", "defended")
_MODEL = "small-reconstructor"
_SHOWN = 4  # images in the figure
_ALIKE = ("seed", "sigma", "data", "denoiser", "autoencoder", "pretrain")  # what a pre-trained stack depends on


@dataclass(frozen=True)
class Column:
    """A column of the paper's figure; `paper` is RMSE and SSIM at attack norm 0, then at norm 1."""

    title: str
    preset: str
    paper: tuple[float, float, float, float]

    @property
    def undefended(self) -> bool:
        return self.preset == "recon-standard"


COLUMNS = (
    Column("Standard", "recon-standard", (0.112, 0.888, 0.346, 0.417)),
    Column("FO-DS", "recon-fo-ds", (0.143, 0.781, 0.168, 0.703)),
    Column("ZO-DS", "recon-zo-ds", (0.197, 0.521, 0.217, 0.474)),
    Column("FO-AE-DS", "recon-fo-ae-ds", (0.139, 0.792, 0.162, 0.717)),
    Column("ZO-AE-DS", "recon-zo-ae-ds", (0.141, 0.790, 0.164, 0.718)),
)


@dataclass(frozen=True)
class Result:
    """What a column came to: means over the attacked images, RMSE and SSIM to the original by route of the attack.

    `seconds`: of training and of each attack, in this call of the command.
    """

    preset: str
    images: int
    copies: int
    clean: tuple[float, float]
    attacked: dict[str, tuple[float, float]]
    training_queries: int
    other_queries: int
    attack_queries: int
    samples: int
    seconds: float


def main() -> None:
    options = _options()
    said = heading("torch", "numpy", "scikit-image")
    from benchmarks.table.oracles import Hidden, TableOracle

    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    weights = options.weights or _train_reconstructor(options)
    oracle = TableOracle(out / "oracle", Hidden(_MODEL, weights), ["--task", "reconstruction"])
    try:
        results = []
        for column in COLUMNS:
            results.append(_column(options, column, weights, oracle))
            _write(out, results, said)
    finally:
        oracle.stop()
    _draw(options, weights, out / "reconstruction.png")
    print((out / "reconstruction.md").read_text(encoding="utf-8"))


def _options() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.reconstruction", description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--data", type=Path, help="Directory of the data set's files; not needed for digits.")
    parser.add_argument("--weights", type=Path, help="A reconstructor; by default one is trained.")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=200, help="Test images that are attacked.")
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--copies", type=int, default=10, help="Noisy copies that the smoothing averages.")
    parser.add_argument("--epochs", type=int, default=6, help="Of the reconstructor, where it is trained here.")
    found = parser.parse_args()
    for name in ("out", "data", "weights"):
        path = getattr(found, name)
        setattr(found, name, None if path is None else path.resolve())
    return found


def _train_reconstructor(options: argparse.Namespace) -> Path:
    weights: Path = options.out / "reconstructor.safetensors"
    if not weights.exists():
        data = [] if options.data is None else ["--data", str(options.data)]
        command = [sys.executable, "-m", "oracle_server", "train-reconstructor", "--dataset", options.dataset, *data]
        done = subprocess.run([*command, "--epochs", str(options.epochs), "--out", str(weights)], check=False, cwd=ROOT)
        if done.returncode:
            raise Failed(f"train-reconstructor ended with exit code {done.returncode}")
    return weights


def _column(options: argparse.Namespace, column: Column, weights: Path, oracle: object) -> Result:
    from benchmarks.table.oracles import TableOracle
    from defender_client import attack_reconstruction, jobs
    from defender_client import config as configs
    from defender_client.audit import audit
    from defender_client.progress import console
    from defender_client.report import read_run
    from defender_client.run_directory import locked
    from defender_client.whitebox import WhiteBoxSource

    assert isinstance(oracle, TableOracle)
    run = options.out / "runs" / column.preset
    kept = run / "reconstruction-row.json"
    if kept.exists():
        return Result(**json.loads(kept.read_text(encoding="utf-8")))
    console.print(f"[bold]{column.title}[/bold] ({column.preset})")
    start = time.monotonic()
    settings = [f"data.dataset={options.dataset}", f"seed={options.seed}"]
    scale = "full" if column.undefended and options.scale == "full" else options.scale
    config = configs.load_preset(column.preset, settings, scale)
    with locked(run) as run_id:
        client = f"{column.preset}-{run_id[:8]}"
    source, box = oracle.client(client), WhiteBoxSource(weights)
    copies = 0 if column.undefended else options.copies  # the undefended one is asked as it is
    # Each image costs its clean and its attacked answer, for each route; the undefended one has one route.
    routes = ROUTES[:1] if column.undefended else ROUTES
    planned = jobs.plan_job(config, run, options.data, source)
    with source.connect() as remote:
        statement = remote.budget()
    spent = statement.spent if statement is not None else 0
    oracle.grant(client, spent + planned.to_train + len(routes) * 2 * max(1, copies) * options.images)
    _begin_alike(options, config, run)
    whitebox = box if config.estimator.name == "fo" else None
    jobs.train_job(config, run, options.data, source, lambda _: None, whitebox)
    attacked, clean = {}, (0.0, 0.0)
    for route in routes:
        changes = {"through": route, "epsilon": options.epsilon, "steps": options.steps, "images": options.images}
        done = jobs.attack_job(run, options.data, source, changes | {"copies": copies}, box, lambda _: None)
        rows = [row for row in attack_reconstruction.read(done.path) if row.idx < options.images]
        found = attack_reconstruction.summary(rows)
        clean = (found.rmse or 0.0, found.ssim or 0.0)
        attacked[route] = (found.attacked_rmse or 0.0, found.attacked_ssim or 0.0)
    with source.connect() as remote:
        audited = audit([run], remote)
    if not audited.equal:
        raise Failed(f"{run}: the accounts differ: {'; '.join(audited.differences)}")
    read = read_run(run)
    training, attacks = read.queries.get("train", 0), read.queries.get("attack", 0)
    steps = int(read.curve[-1]["step"]) if read.curve else 0
    result = Result(
        preset=column.preset,
        images=options.images,
        copies=copies,
        clean=clean,
        attacked=attacked,
        training_queries=training,
        other_queries=sum(read.queries.values()) - training - attacks,
        attack_queries=attacks,
        samples=steps * config.train.batch if config.estimator.name != "none" else 0,
        seconds=time.monotonic() - start,
    )
    kept.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    return result


def _begin_alike(options: argparse.Namespace, config: RunConfig, run: Path) -> None:
    """Take the pre-trained stack of another column that began alike: the same seed, data and stack."""
    import os
    import shutil

    from defender_client import config as configs
    from defender_client.pretrain import PRETRAINED_FILE

    target = run / PRETRAINED_FILE
    for column in COLUMNS:
        other = options.out / "runs" / column.preset
        if target.exists() or not (other / PRETRAINED_FILE).exists():
            continue
        theirs = configs.load(other)
        if all(getattr(theirs, part) == getattr(config, part) for part in _ALIKE):
            shutil.copyfile(other / PRETRAINED_FILE, target.with_suffix(".tmp"))
            os.replace(target.with_suffix(".tmp"), target)


def _write(out: Path, results: Sequence[Result], said: str) -> None:
    by_preset = {result.preset: result for result in results}
    lines, costs = [], []
    for column in COLUMNS:
        result = by_preset.get(column.preset)
        if result is None:
            continue
        pairs = (result.clean, result.attacked.get("classifier"), result.attacked.get("defended"))
        cells = ["-" if pair is None else f"{pair[0]:.3f} / {pair[1]:.3f}" for pair in pairs]
        if column.undefended:  # on the undefended one, the transferred attack is the adaptive one
            cells[2] = cells[1]
        paper = [f"{column.paper[i]:.3f} / {column.paper[i + 1]:.3f}" for i in (0, 2)]
        lines.append([column.title, *cells, *paper])
        costs.append(
            [
                column.title,
                f"{result.samples:,}",
                f"{result.training_queries:,}",
                f"{result.other_queries:,}",
                f"{result.attack_queries:,}",
                f"{result.seconds:,.0f}",
            ]
        )
    head = ["RMSE / SSIM", "norm 0", "norm 1, transferred", "norm 1, adaptive", "paper, 0", "paper, 1 (transferred)"]
    cost_head = ["cost", "samples", "training queries", "outputs, noise floor, validation", "attack queries", "s"]
    text = "\n\n".join([f"```\n{said}\n```", table(head, lines), table(cost_head, costs)]) + "\n"
    (out / "reconstruction.md").write_text(text, encoding="utf-8")
    (out / "reconstruction.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


def _draw(options: argparse.Namespace, weights: Path, path: Path) -> None:
    """The six panels, from the white box and the runs' stacks: no query."""
    import matplotlib
    import torch

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from defender_client import stack as stacks
    from defender_client.attack import crafting_generator
    from defender_client.attack_reconstruction import craft
    from defender_client.config import AttackConfig, DataConfig
    from defender_client.data import load_test
    from defender_client.measured import measure
    from defender_client.pgd import draws
    from defender_client.train import STACK_FILE
    from shared.models.loading import load_reconstructor

    loaded = load_reconstructor(weights)
    test = measure(load_test(DataConfig(dataset=options.dataset), options.data), loaded.measurement)
    titles = ["ground truth", *(column.title for column in COLUMNS)]
    settings = AttackConfig(
        epsilon=options.epsilon, steps=options.steps, copies=options.copies, seed=options.seed, whitebox="figure"
    )
    figure, axes = plt.subplots(
        2 * _SHOWN, len(titles), figsize=(1.3 * len(titles), 2.6 * _SHOWN + 0.3), layout="constrained", squeeze=False
    )
    for number in range(_SHOWN):
        part = slice(number, number + 1)
        original, shown = test.originals(part), test.floats(part)[0]
        for place, column in enumerate(COLUMNS, start=1):
            stack = stacks.load(options.out / "runs" / column.preset / STACK_FILE)
            copies = 0 if column.undefended else options.copies
            own = settings.model_copy(update={"copies": copies})
            moved = craft(stack, loaded.module, shown, original, own, crafting_generator(own, number))
            for row, image in ((2 * number, shown), (2 * number + 1, moved)):
                noise = torch.Generator().manual_seed(options.seed * 1_000_003 + number)
                with torch.no_grad():
                    noisy = draws(image[None], stack.spec.sigma, copies, noise)[:, 0]
                    made = loaded.module(stack(noisy)).mean(0).view_as(original[0])
                _panel(axes[row][place], made)
        for row in (2 * number, 2 * number + 1):
            _panel(axes[row][0], original[0])
    for place, title in enumerate(titles):
        axes[0][place].set_title(title, fontsize=9)
    for row in range(2 * _SHOWN):
        what = "no attack" if row % 2 == 0 else f"norm {options.epsilon:g}, adaptive"
        axes[row][0].set_ylabel(what, fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axes: object, image: object) -> None:
    from matplotlib.axes import Axes
    from torch import Tensor

    assert isinstance(axes, Axes)
    assert isinstance(image, Tensor)
    array = image.clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(array[:, :, 0] if array.shape[2] == 1 else array, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])


if __name__ == "__main__":
    from shared.process import prepare

    prepare()
    main()
