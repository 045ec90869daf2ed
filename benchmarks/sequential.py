"""Sequential certification against a fixed n: queries an image, certified accuracy, and how often it is wrong.

    python -m benchmarks.sequential [--from DIR_OR_TSV ...] [--counts FILE] [--n 10000] [--sigma 0.25] [--alpha 0.001]
                                    [--images 20000] [--trials 10000] [--seed 0] [--run RUN --run-images 20]

Simulated, from images whose probability p of the class selected under noise is known, or taken to be:

    synthetic   a mixture near Cohen et al. 2019 on CIFAR-10 at sigma 0.25: the class is the label for 77 % of all
                images, whose true radius is at least 1, 2, 3, 3.8 sigma for 61, 44, 28, 17 %, none beyond 5.5 sigma; of
                the others, 70 % have Exp(0.7) sigma, and 30 % a class below 1/2 (-Exp(0.4) sigma)
    --from      certified.tsv of a fixed n, each image with the p that its count estimates; of one without a failure, p
                is drawn from its posterior, Beta(n + 1, 1). Their n is --from-n, their sigma --from-sigma. Images that
                abstained get p at random up to 1/2: their counts are not in the file.
    --counts    lines SUCCESSES N CORRECT.

Both methods see the same draws: the fixed one all n, the sequential one the first of them. Its error is counted at the
edge of each target, where the true radius is the target itself and everything beyond is wrong.

--run certifies a run's first images really, both ways under the same noise, against the digits classifier
in this process: --run-images of them, with the same n.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from benchmarks.measuring import heading, table
from defender_client.sequential import Design, design
from defender_client.smoothing import lower_confidence_bound, radius

N0 = 100
SETS = ((0.0, 0.25, 0.5), (0.0, 0.25, 0.5, 0.75))
AIMS = (5.0, 2.5)

Images = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""p of each image's selected class, and whether that is its label."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="files", type=Path, nargs="+", help="certified.tsv, or directories of some.")
    parser.add_argument("--from-n", type=int, default=1000)
    parser.add_argument("--from-sigma", type=float, default=0.25)
    parser.add_argument("--counts", type=Path, help="Lines SUCCESSES N CORRECT, instead.")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument(
        "--images", type=int, default=20_000, help="Simulated, at least: those that are read, repeated."
    )
    parser.add_argument("--trials", type=int, default=10_000, help="At the edge of each target.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="A run on the digits to certify both ways.")
    parser.add_argument("--run-images", type=int, default=20)
    options = parser.parse_args()
    print(heading("numpy", "scipy"), flush=True)
    rng = np.random.default_rng(options.seed)
    named = _images(options, rng)
    for name, images in named.items():
        p, right = (np.resize(values, max(options.images, len(values))) for values in images)
        print(f"\n{name}: {len(images[0]):,} images, {len(p):,} simulated; n = {options.n:,}, n0 = {N0}, sigma")
        print(f"{options.sigma:g}, alpha {options.alpha:g}, seed {options.seed}\n")
        print(compare((p, right), options.n, options.sigma, options.alpha, rng), flush=True)
    print(f"\nwrong certificates at the edge, of {options.trials:,}\n")
    print(errors(options.n, options.sigma, options.alpha, options.trials, rng), flush=True)
    if options.run is not None:
        print(f"\n{options.run}: the first {options.run_images} images, really\n")
        print(real(options.run, options.run_images, options.n, options.alpha), flush=True)


def _images(options: argparse.Namespace, rng: np.random.Generator) -> dict[str, Images]:
    if options.counts is not None:
        successes, n, correct = np.loadtxt(options.counts, ndmin=2).T
        return {str(options.counts): (estimated(successes, n, rng), correct > 0)}
    if not options.files:
        return {"synthetic": synthetic(options.images, rng)}
    files = [file for given in options.files for file in (sorted(given.rglob("*.tsv")) if given.is_dir() else [given])]
    return {str(file): read(file, options.from_n, options.from_sigma, options.alpha, rng) for file in files}


def synthetic(size: int, rng: np.random.Generator) -> Images:
    """The mixture that the head of this file describes."""
    share = rng.random(size)
    right = share < 0.77
    z = np.interp(share, [0, 0.17, 0.28, 0.44, 0.61, 0.77], [5.5, 3.8, 3, 2, 1, 0])
    other = np.where(rng.random(size) < 0.3, -rng.exponential(0.4, size), rng.exponential(0.7, size))
    return norm.cdf(np.where(right, z, other)), right


def read(file: Path, n: int, sigma: float, alpha: float, rng: np.random.Generator) -> Images:
    """Images of a certified.tsv of n draws each: the count behind a radius is the one that gives it."""
    from defender_client.certify import read as rows_of

    rows = rows_of(file, "fixed")
    bounds = np.array([radius(lower_confidence_bound(k, n, alpha), sigma) for k in range(n + 1)])
    radii = np.array([row.radius for row in rows])
    successes = np.abs(bounds[:, None] - radii - 5e-7).argmin(axis=0)
    if (np.abs(bounds[successes] - radii) > 2e-6)[radii > 0].any():
        raise SystemExit(f"{file}: these are not radii of n = {n} and sigma {sigma:g}: see --from-n and --from-sigma")
    p = np.where(radii > 0, estimated(successes, np.full(len(rows), n), rng), rng.uniform(0.2, 0.5, len(rows)))
    # An abstention may still be of the right class, which the file does not say; it counts for no method.
    return p, np.array([row.correct == 1 for row in rows])


def estimated(successes: NDArray[np.int64], n: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
    """p-hat, or a draw of the posterior under a flat prior where no draw failed."""
    return np.where(successes == n, rng.beta(n + 1, 1), successes / n)


def failures(q: NDArray[np.float64], at: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
    """Failures up to each look [images, looks]."""
    return rng.binomial(np.diff((0, *at)), q[:, None]).cumsum(axis=1)


def compare(images: Images, n: int, sigma: float, alpha: float, rng: np.random.Generator) -> str:
    """Queries an image and certified accuracies of both methods, a row each."""
    p, right = images
    rows = []
    fixed = cache(lambda failed: radius(lower_confidence_bound(n - failed, n, alpha), sigma))
    for targets, aim in zip(SETS, AIMS, strict=True):
        plan = design(sigma, alpha, n, targets)
        seen = failures(1 - p, plan.at, rng)
        reached, draws = plan.follow(seen)
        radii = np.array([-1.0, *plan.radii])[reached]
        of_fixed = np.array([fixed(int(k)) for k in seen[:, -1]])
        name, each = ", ".join(f"{r:g}" for r in targets), N0 + float(draws.mean())
        ours = [100 * float((right & (radii >= r)).mean()) for r in targets]
        theirs = [100 * float((right & (of_fixed > 0) & (of_fixed >= r)).mean()) for r in targets]
        pad = [""] * (len(SETS[-1]) - len(targets))
        rows.append([f"{{{name}}}, fixed", f"{N0 + n:,}", "1", "", *(f"{a:.2f}" for a in theirs), *pad])
        saved = f"{(N0 + n) / each:.2f}"
        rows.append([f"{{{name}}}, sequential", f"{each:,.0f}", saved, f"{aim:g}", *(f"{a:.2f}" for a in ours), *pad])
        differences = [f"{a - b:+.2f}" for a, b in zip(ours, theirs, strict=True)]
        rows.append([f"{{{name}}}, difference", "", "", "", *differences, *pad])
    return table(["", "queries an image", "saved, times", "aim", *(f"r = {r:g}, %" for r in SETS[-1])], rows)


def errors(n: int, sigma: float, alpha: float, trials: int, rng: np.random.Generator) -> str:
    """How often images whose true radius is a target are certified to it, or beyond."""
    plan = design(sigma, alpha, n, SETS[-1])
    rows = []
    for target in plan.targets:
        wrong = _wrong(plan, target, trials, rng)
        high = binomtest(wrong, trials).proportion_ci(0.95, method="exact").high
        rows.append([f"r = {target:g}", f"{wrong}", f"{wrong / trials:.5f}", f"{high:.5f}", f"{alpha:g}"])
    return table(["true radius", "wrong", "rate", "up to (95 %)", "alpha"], rows)


def _wrong(plan: Design, target: float, trials: int, rng: np.random.Generator) -> int:
    q = np.full(trials, norm.sf(target / plan.sigma))
    reached, _ = plan.follow(failures(q, plan.at, rng))
    return int((reached > plan.radii.index(target)).sum())


def real(run: Path, images: int, n: int, alpha: float) -> str:
    """A run's stack in front of the digits classifier in this process, both ways under the same noise."""
    import torch

    from defender_client import config as configs
    from defender_client import stack as stacks
    from defender_client.data import load_test
    from defender_client.smoothing import Certificate, Smooth
    from defender_client.train import STACK_FILE
    from oracle_server.loading import load_classifier
    from oracle_server.settings import Settings

    config, stack = configs.load(run), stacks.load(run / STACK_FILE).eval()
    classifier, test = load_classifier(Settings()).module, load_test(config.data, None)
    sigma = stack.spec.sigma
    smooth = Smooth(lambda batch: classifier(stack(batch)), stack.spec.classes, sigma)
    columns: dict[str, list[Certificate]] = {"fixed": []}
    farthest = {"fixed": SETS[-1][-1]}
    for index in range(min(images, len(test))):
        x = test.floats(slice(index, index + 1))[0]
        seeded = torch.Generator().manual_seed(index)
        columns["fixed"].append(smooth.certify(x, N0, n, alpha, 1000, seeded))
        for targets in SETS:
            name = f"sequential, {{{', '.join(f'{r:g}' for r in targets)}}}"
            tests = design(sigma, alpha, n, targets)
            found = smooth.certify_sequentially(x, N0, tests, 1000, torch.Generator().manual_seed(index))
            columns.setdefault(name, []).append(found)
            farthest[name] = targets[-1]  # beyond it nothing was asked
    rows = []
    for name, found_of in columns.items():
        right = [c.radius if c.label == int(test.labels[i]) else -1.0 for i, c in enumerate(found_of)]
        aimed = [target for target in SETS[-1] if target <= farthest[name]]
        cells = [f"{100 * sum(r >= target for r in right) / len(right):.1f}" for target in aimed]
        cells += [""] * (len(SETS[-1]) - len(aimed))
        rows.append([name, f"{sum(c.queries for c in found_of) / len(found_of):,.0f}", *cells])
    return table(["", "queries an image", *(f"r = {r:g}, %" for r in SETS[-1])], rows)


if __name__ == "__main__":
    main()
