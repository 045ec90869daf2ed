"""How noisy is a function, and what step do finite differences of it need? Nothing here knows where values come from.

    f(w + t u) = f_s(t) + e(t)      f_s smooth, e noise of mean 0 and standard deviation eps_f

The noise level eps_f is estimated by ECnoise (Moré and Wild, "Estimating Computational Noise", SIAM J. Sci. Comput.
33(3), 2011) and the step from it (Moré and Wild, "Estimating Derivatives of Noisy Simulations", ACM TOMS 38(3), 2012).
Neither asks what the noise is: rounding, of floats or to k decimals, random noise, an iteration stopped early.

A function takes points [p, d] and returns their values [p]; each round of a measurement is one such call, and how many
rows it has is known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Function = Callable[[Floats], Floats]
Difference = Literal["forward", "central"]

# m + 1 = 7 values a line, what the paper recommends; the middle one is the point itself.
LINE_POINTS = 7
_CONSISTENT = 4.0  # three consecutive sigma_k within this factor of each other are the noise
_CHANGE = 100.0  # the paper's advice: another spacing, by this factor
_WIDE = 0.1  # beyond this range, relative to their size, values may swing by themselves

# tau_1 and tau_2 of the paper: a difference stands out from the noise, and its points are near each other.
_STANDS_OUT, _NEAR = 100.0, 0.1
TRIALS = 2  # steps that a derivative is tried with


class Outcome(StrEnum):
    """What a difference table shows."""

    FOUND = "found"
    TOO_CLOSE = "spacing too small: at least half of the values equal their neighbour"
    TOO_FAR = "spacing too large: the differences do not settle at a level"


@dataclass(frozen=True)
class NoiseEstimate:
    """The noise of one line of equally spaced values.

    Attributes:
        level: eps_f in units of the values; None unless the outcome is FOUND.
        order: k, the order of the differences that show it; None likewise.
        outcome: FOUND, or why nothing was.
        wide: the values differ by more than a tenth of their size. The paper then sees the spacing as too large: what
            swings may be the function itself, or much noise, and only lines of a smaller spacing can tell.
    """

    level: float | None
    order: int | None
    outcome: Outcome
    wide: bool

    @property
    def factor(self) -> float:
        """By what the spacing should change for the next attempt: 1, 100 or 1/100."""
        if self.outcome is Outcome.TOO_CLOSE:
            return _CHANGE
        return 1 / _CHANGE if self.wide or self.outcome is Outcome.TOO_FAR else 1.0


def ecnoise(values: Sequence[float] | Floats) -> NoiseEstimate:
    """The noise level in values f(t), f(t + h), ..., f(t + m h): ECnoise of Moré and Wild 2011, section 3.

    Raises:
        ValueError: fewer than 4 values, or values that are not finite.
    """
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or len(column) < 4 or not np.isfinite(column).all():
        raise ValueError("a difference table needs at least 4 finite values in a row")
    m = len(column) - 1
    wide = bool(column.max() - column.min() > _WIDE * np.abs(column).max())
    gamma, levels, changes_sign = 1.0, [], []
    for k in range(1, m + 1):
        # Differences of f_s vanish with h^k, those of the noise grow: E[(D^k e)^2] = eps_f^2 / gamma_k.
        #   T_{i,k} = T_{i+1,k-1} - T_{i,k-1},    gamma_k = (k!)^2 / (2k)!
        #   sigma_k^2 = gamma_k / (m + 1 - k) * sum_i T_{i,k}^2
        column = np.diff(column)
        if k == 1 and np.count_nonzero(column == 0) >= (m + 1) / 2:
            return NoiseEstimate(None, None, Outcome.TOO_CLOSE, wide)
        gamma *= k / (2.0 * (2 * k - 1))
        levels.append(math.sqrt(gamma * float(np.mean(column**2))))
        changes_sign.append(bool(column.min() < 0 < column.max()))
    for k in range(1, m - 1):
        # The first k whose differences change sign and whose sigma_k, sigma_{k+1}, sigma_{k+2} agree.
        three = levels[k - 1 : k + 2]
        if changes_sign[k - 1] and max(three) <= _CONSISTENT * min(three):
            return NoiseEstimate(levels[k - 1], k, Outcome.FOUND, wide)
    return NoiseEstimate(None, None, Outcome.TOO_FAR, wide)


@dataclass(frozen=True)
class LineNoise:
    """The noise at one point, over all rounds.

    Attributes:
        level: root mean square of the levels that rounds found; None where none did. What wide lines found counts only
            where no other did, and only as far as it persists at the smallest spacing that showed it.
        spacing: h of the last round.
        outcome: FOUND, or what the last round lacked.
    """

    level: float | None
    spacing: float
    outcome: Outcome


class _Search:
    """The spacing of one point's lines: the paper's advice, and between two refused spacings their geometric mean."""

    def __init__(self, spacing: float, limit: float) -> None:
        self.spacing = min(spacing, limit)
        self.outcome = Outcome.TOO_CLOSE
        self._levels: list[float] = []
        self._wide: list[tuple[float, float]] = []  # spacing, level
        self._limit, self._too_close, self._too_far = limit, 0.0, math.inf

    def tell(self, estimate: NoiseEstimate, last: bool) -> None:
        if estimate.level is not None and not estimate.wide:
            self._levels.append(estimate.level)
        elif estimate.level is not None:
            self._wide.append((self.spacing, estimate.level))
        found = self._levels or self._wide
        self.outcome = Outcome.FOUND if found else estimate.outcome
        if last or self._levels:  # where something was found, stay, along other directions
            return
        if estimate.outcome is Outcome.TOO_CLOSE:
            self._too_close = self.spacing
        else:
            self._too_far = self.spacing
        advised = self.spacing * estimate.factor
        if not self._too_close < advised < self._too_far:
            advised = math.sqrt(self._too_close * self._too_far)
        self.spacing = min(advised, self._limit)

    @property
    def result(self) -> LineNoise:
        levels = self._levels
        if not levels and self._wide:
            _, smallest = min(self._wide)
            levels = [level for _, level in self._wide if level <= _CONSISTENT * smallest]
        level = math.sqrt(float(np.mean(np.square(levels)))) if levels else None
        return LineNoise(level, self.spacing, self.outcome)


def measure_noise(f: Function, points: Floats, directions: Floats, spacing: float, limit: float) -> list[LineNoise]:
    """The noise of `f` at each point; `len(directions)` calls of b * LINE_POINTS rows, point by point.

    Each round asks for one line through each point. A line that shows nothing is followed by one of another spacing, as
    the paper advises; one that does, by lines along other directions, to average over.

    Args:
        points: w [b, d].
        directions: unit vectors [rounds, b, d].
        spacing: h of the first round, in units of the points.
        limit: the largest spacing.
    """
    b, d = points.shape
    searches = [_Search(spacing, limit) for _ in range(b)]
    offsets = np.arange(LINE_POINTS) - LINE_POINTS // 2
    for number, along in enumerate(directions, start=1):
        steps = np.array([search.spacing for search in searches])
        lines = points[:, None] + (steps[:, None] * offsets)[:, :, None] * along[:, None]
        values = f(lines.reshape(-1, d)).reshape(b, LINE_POINTS)
        for search, line in zip(searches, values, strict=True):
            search.tell(ecnoise(line), last=number == len(directions))
    return [search.result for search in searches]


@dataclass(frozen=True)
class Slopes:
    """How `f` changes along directions; root mean squares over them, with what the noise adds to a square taken off.

    Attributes:
        first: of f'; 0 where it does not stand out from the noise.
        higher: of f'' (for forward differences) or f''' (for central ones), and one standard error more.
        accepted: the fraction of directions whose higher derivative passed the paper's tests, in 0..1.
    """

    first: float
    higher: float
    accepted: float


def slope_rows(difference: Difference, directions: int) -> int:
    """Rows per point and trial that `measure_slopes` asks for."""
    return 1 + 2 * directions if difference == "forward" else 4 * directions


def measure_slopes(
    f: Function, points: Floats, directions: Floats, noise: Floats, difference: Difference, limit: float
) -> Slopes:
    """First and second (or third) derivatives; TRIALS calls of b * `slope_rows` rows, point by point.

    The heuristic of Moré and Wild 2012 for a coarse |f''|, and the same for |f'''|, with k the order of the derivative
    and D_k its undivided difference:

        h_a = eps_f^(1/(k+2)),  mu_a = |D_k(h_a)| / h_a^k;    h_b = (eps_f / mu_a)^(1/(k+2)),  mu_b likewise
        accepted:  |D_k| >= tau_1 eps_f   and   f changes by at most tau_2 of its size over the difference's points
        else mu_b is accepted if |mu_a - mu_b| <= mu_b / 2

    h_a is where noise, eps_f / h^k, and the next term of Taylor's series, h^2, balance for derivatives of size 1.
    Where nothing is accepted mu_b is taken as it is: the step needs no more than its size, and asks for its root.

    Args:
        points: w [b, d].
        directions: unit vectors [b, n, d].
        noise: eps_f > 0 of each point, [b].
        limit: how far from its point a value may be asked for.
    """
    b, n, _ = directions.shape
    order, reach = (2, 1) if difference == "forward" else (3, 2)
    eps = np.broadcast_to(noise[:, None], (b, n))
    largest = limit / reach
    step = np.minimum(eps ** (1 / (order + 2)), largest)
    trials = []
    for _ in range(TRIALS):
        trial = _differences(f, points, directions, step, eps, difference)
        trials.append(trial)
        with np.errstate(divide="ignore"):
            step = np.minimum((eps / np.abs(trial.higher)) ** (1 / (order + 2)), largest)
    a, second = trials
    agree = np.abs(np.abs(a.higher) - np.abs(second.higher)) <= np.abs(second.higher) / 2
    accepted = a.accepted | second.accepted | agree

    def of(name: str) -> Floats:
        chosen: Floats = np.where(a.accepted, getattr(a, name), getattr(second, name))
        return chosen

    return Slopes(
        first=_rms_without(of("first"), of("first_noise")),
        higher=_rms_bound(of("higher"), of("higher_noise")),
        accepted=float(accepted.mean()),
    )


@dataclass(frozen=True)
class _Trial:
    """Derivatives along directions, [b, n] each, at one step; `*_noise`: their standard deviation by noise alone."""

    first: Floats
    first_noise: Floats
    higher: Floats
    higher_noise: Floats
    accepted: NDArray[np.bool_]


def _differences(
    f: Function, points: Floats, directions: Floats, step: Floats, eps: Floats, difference: Difference
) -> _Trial:
    b, n, d = directions.shape
    moves = step[:, :, None] * directions
    base = points[:, None]
    if difference == "forward":
        rows = np.concatenate([base, base + moves, base - moves], axis=1)
        values = f(rows.reshape(-1, d)).reshape(b, -1)
        ahead, behind = values[:, 1 : 1 + n], values[:, 1 + n :]
        stencil = np.stack([behind, np.broadcast_to(values[:, :1], (b, n)), ahead])
        # D_2 = f(h) - 2 f(0) + f(-h) = h^2 f'' + O(h^4), variance (1 + 4 + 1) eps_f^2
        undivided, variance, scale = ahead - 2 * values[:, :1] + behind, 6.0, step**2
    else:
        rows = np.concatenate([base + moves, base - moves, base + 2 * moves, base - 2 * moves], axis=1)
        stencil = f(rows.reshape(-1, d)).reshape(b, 4, n).transpose(1, 0, 2)
        ahead, behind, far_ahead, far_behind = stencil
        # D_3 = (f(2h) - 2 f(h) + 2 f(-h) - f(-2h)) / 2 = h^3 f''' + O(h^5), variance (1 + 4 + 4 + 1) eps_f^2 / 4
        undivided, variance, scale = (far_ahead - far_behind) / 2 - (ahead - behind), 2.5, step**3
    size = np.abs(stencil).max(axis=0)
    near = stencil.max(axis=0) - stencil.min(axis=0) <= _NEAR * size
    return _Trial(
        # (f(h) - f(-h)) / 2h = f' + O(h^2), variance 2 eps_f^2 / 4h^2
        first=(ahead - behind) / (2 * step),
        first_noise=eps * math.sqrt(0.5) / step,
        higher=undivided / scale,
        higher_noise=eps * math.sqrt(variance) / scale,
        accepted=(np.abs(undivided) >= _STANDS_OUT * eps) & near,
    )


def _rms_without(values: Floats, noise: Floats) -> float:
    """Root mean square of `values` less that of the noise in them, [b, n]; 0 where nothing is left."""
    return math.sqrt(max(0.0, float(np.mean(values**2 - noise**2))))


def _rms_bound(values: Floats, noise: Floats) -> float:
    """As `_rms_without`, and one standard error of the mean square more: what noise may hide is not taken to be 0."""
    seen = max(0.0, float(np.mean(values**2 - noise**2)))
    # The square of normal noise has the standard deviation sqrt(2) sigma^2; rounding may show less than that.
    spread = max(float(np.std(values**2)), math.sqrt(2 * float(np.mean(noise**4))))
    return math.sqrt(seen + spread / math.sqrt(values.size))


def noise_error(difference: Difference, step: float, noise: float) -> float:
    """Root mean square error of a difference by the noise of its two values: sqrt(2) eps_f / h, or eps_f / (sqrt(2) h).

    Forward: (f(h) - f(0)) / h; central: (f(h) - f(-h)) / 2h.
    """
    return math.sqrt(2) * noise / step if difference == "forward" else noise / (math.sqrt(2) * step)


def difference_error(difference: Difference, step: float, noise: float, higher: float) -> float:
    """Root mean square error of a finite difference with step h, by noise and by what Taylor's series leaves.

        forward:  E^2 = (h f'' / 2)^2     + 2 eps_f^2 / h^2       (Moré and Wild 2012, their bound)
        central:  E^2 = (h^2 f''' / 6)^2  + eps_f^2 / (2 h^2)

    Args:
        higher: |f''| or |f'''|, as in `Slopes`.
    """
    truncation = step * higher / 2 if difference == "forward" else step**2 * higher / 6
    return math.hypot(truncation, noise_error(difference, step, noise))


def best_step(difference: Difference, noise: float, higher: float) -> float:
    """The step with the least `difference_error`; infinite for a function without the higher derivative.

        forward:  h* = 8^(1/4) (eps_f / |f''|)^(1/2)    the zero of dE^2/dh = h f''^2 / 2 - 4 eps_f^2 / h^3
        central:  h* = (3 eps_f / |f'''|)^(1/3)         the zero of dE^2/dh = h^3 f'''^2 / 9 - eps_f^2 / h^3

    The first is that of Moré and Wild 2012; both are in Berahas, Byrd and Nocedal, SIAM J. Optim. 29(2), 2019.
    """
    if higher == 0:
        return math.inf
    if difference == "forward":
        return float(8**0.25 * math.sqrt(noise / higher))
    return float((3 * noise / higher) ** (1 / 3))
