"""A policy file: TOML, validated whole before anything is served, frozen. What it leaves out is off."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

Scores = Literal["logits", "probabilities", "label"]
Task = Literal["classification", "reconstruction"]  # as the wire has it, of which this module knows nothing
Probability = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[float, Field(ge=0, le=600_000)]


class PolicyError(ValueError):
    """A policy file that cannot be used; the message names the file and the key."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class NoiseSpec(_Section):
    """Gaussian noise of standard deviation `sigma` on each logit.

    `fresh`: new with each charge. `deterministic`: a function of the image, the same each time it is asked about.
    """

    sigma: PositiveFloat
    kind: Literal["fresh", "deterministic"] = "fresh"


class AnswerSpec(_Section):
    """What is told of the logits. `top_k` and `decimals` act on what is returned, logits or probabilities.

    Of a reconstruction, `noise` and `decimals` act on its pixels, and the others mean nothing.
    """

    scores: Scores = "logits"
    noise: NoiseSpec | None = None
    # Beyond these a softmax is a label, or says nothing at all.
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    top_k: PositiveInt | None = None
    decimals: Annotated[int, Field(ge=0, le=9)] | None = None  # a float32 in [0, 1] has no more

    @model_validator(mode="after")
    def _label_is_all(self) -> AnswerSpec:
        idle = sorted({"temperature", "top_k", "decimals"} & self.model_fields_set)
        if self.scores == "label" and idle:
            raise ValueError(f'{" and ".join(idle)} cannot change an answer of scores = "label": leave out one of both')
        return self


class LatencySpec(_Section):
    """Time added to each answer: `milliseconds` + `per_row_microseconds` * rows + the jitter.

    `jitter_milliseconds` is the width of a uniform distribution that begins at 0, or the scale of a half-normal one.
    """

    milliseconds: Milliseconds = 0.0
    jitter_milliseconds: Milliseconds = 0.0
    distribution: Literal["uniform", "half-normal"] = "uniform"
    per_row_microseconds: NonNegativeFloat = 0.0


class LimitSpec(_Section):
    """Most rows of a batch, and token buckets for each client.

    A bucket is refilled by so much a minute and holds `*_burst` when full; what comes in a minute, unless said.
    """

    batch_rows: PositiveInt | None = None
    announce_batch_rows: bool = True  # in the model's metadata
    tell_limit: bool = True  # in the refusal of a batch that is too large
    requests_per_minute: PositiveInt | None = None
    request_burst: PositiveInt | None = None
    rows_per_minute: PositiveInt | None = None
    row_burst: PositiveInt | None = None

    @model_validator(mode="after")
    def _bursts_have_rates(self) -> LimitSpec:
        for burst, rate in (("request_burst", "requests_per_minute"), ("row_burst", "rows_per_minute")):
            if getattr(self, burst) is not None and getattr(self, rate) is None:
                raise ValueError(f"{burst} is the size of a bucket that {rate} fills: give that, too")
        return self


class FailureSpec(_Section):
    """Probabilities that a request fails: with 503 before anything is charged, with 500 after it was computed."""

    unavailable: Probability = 0.0
    internal: Probability = 0.0


class DowntimeSpec(_Section):
    """A time without service, in seconds: from `after` the start for `seconds`, and again `every` so often."""

    after: NonNegativeFloat
    seconds: PositiveFloat
    every: PositiveFloat | None = None

    @model_validator(mode="after")
    def _ends(self) -> DowntimeSpec:
        if self.every is not None and self.every <= self.seconds:
            raise ValueError("every must be longer than seconds, or the downtime never ends")
        return self


class PolicySpec(_Section):
    """A whole file. The default is no policy at all."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    answers: AnswerSpec = AnswerSpec()
    latency: LatencySpec = LatencySpec()
    limits: LimitSpec = LimitSpec()
    failures: FailureSpec = FailureSpec()
    downtime: Annotated[tuple[DowntimeSpec, ...], Field(strict=False)] = ()


_OF_CLASS_SCORES = ("scores", "temperature", "top_k")
_SECTIONS: dict[str, type[_Section]] = {
    "": PolicySpec,
    "answers.": AnswerSpec,
    "answers.noise.": NoiseSpec,
    "latency.": LatencySpec,
    "limits.": LimitSpec,
    "failures.": FailureSpec,
    "downtime.": DowntimeSpec,
}


def load_policy(path: Path | None, task: Task = "classification", *, votes: bool = False) -> PolicySpec:
    """The policy in a file; the empty one for None.

    Args:
        path: the file.
        task: of the model.
        votes: whether its answers are votes (`--smooth`) and not logits.

    Raises:
        PolicyError: the file cannot be read, is not TOML, holds what no policy has, or what this task, or votes, cannot
            have.
    """
    if path is None:
        return PolicySpec()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PolicyError(f"the policy {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise PolicyError(f"the policy {path} is not text in UTF-8") from None
    try:
        spec = PolicySpec.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"the policy {path} is not TOML: {error}") from None
    except ValidationError as error:
        raise PolicyError(f"the policy {path}: {_first_mistake(error)}") from None
    idle = [name for name in _OF_CLASS_SCORES if getattr(spec.answers, name) != AnswerSpec.model_fields[name].default]
    if task == "reconstruction" and idle:
        raise PolicyError(
            f"the policy {path}: {' and '.join(f'answers.{name}' for name in idle)} change scores of classes, and "
            "--task reconstruction answers with images: leave them out"
        )
    if votes and spec.answers != AnswerSpec():
        raise PolicyError(
            f"the policy {path}: [answers] is about logits, and --smooth answers with votes: leave one of both out"
        )
    return spec


def _first_mistake(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = {name: prefix + name for prefix, section in _SECTIONS.items() for name in section.model_fields}
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        return f"there is no key {where}" + (f": did you mean {known[close[0]]}?" if close else " in a policy")
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}"
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] in ("model_type", "tuple_type"):
        table = f"[[{where}]]" if first["type"] == "tuple_type" else f"[{where}]"
        return f"{where} must be a table: write {table} and its keys below it"
    given = f" = {first['input']!r}" if isinstance(first["input"], str | int | float | bool) else ""
    return f"{where}{given}: {first['msg']}"
