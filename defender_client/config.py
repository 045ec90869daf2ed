"""A run's configuration: read once, frozen, saved beside the run, passed down.

A preset is a TOML file in `presets/`; `--set section.key=value` changes single values. Unknown keys are refused.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from defender_client import zo
from defender_client.errors import ConfigError as ConfigError  # everybody finds it here
from defender_client.preset_files import preset_names, preset_text
from defender_client.scales import FULL, changes_of, merge
from shared import datasets
from shared.augmentation import Augmentation
from shared.models.denoisers import DenoiserSpec

CONFIG_FILE = "config.json"
CERTIFY_FILE = "certify.json"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Section):
    """Which images. `train_images` = 0 takes all that the validation split leaves."""

    dataset: str = "digits"
    validation_images: NonNegativeInt = 200
    train_images: NonNegativeInt = 0
    image_size: PositiveInt | None = None
    augment: Augmentation = "none"

    @model_validator(mode="after")
    def _known(self) -> DataConfig:
        if self.dataset not in datasets.NAMES:
            raise ValueError(f"no data set is called '{self.dataset}': choose one of {', '.join(datasets.NAMES)}")
        return self


class AutoencoderConfig(_Section):
    """`auto` is the paper's where it has one (CIFAR-10 and MNIST with latent 192, STL-10 with 576), and a pyramid of
    convolutions elsewhere. `pca` is linear: principal components of the training images, which nothing is trained of
    afterwards, neither decoder nor encoder; `width` is the pyramid's alone."""

    architecture: Literal["auto", "paper", "pyramid", "pca", "none"] = "auto"
    latent: PositiveInt = 192
    width: PositiveInt = 32


class EstimatorConfig(_Section):
    """How gradients are had: the estimators of `zo` make them of answers, `fo` takes them through a classifier that the
    user holds (see `whitebox`), `none` trains nothing (the undefended classifier). mu is the probes' step; `noise` =
    `adapt` raises it where the oracle's answers are too noisy for it (see `noise_floor`).

    `active`: probe only latents that the encoder's ReLU lets through. `scale`, `spread`, `jitter`: see `zo.Options`.

    `values`: what is differenced: `losses`, or `answers`, whose differences become the loss's by the chain rule, exact
    for any curvature of the loss. `direction`: `gradient`, or `gauss-newton` with its `damping` (see `zo.jacobian`)."""

    name: Literal["rge", "cge", "active-cge", "orthonormal", "prior", "control-variate", "distil", "fo", "none"] = "cge"
    q: NonNegativeInt = 20
    mu: PositiveFloat = 0.005
    difference: Literal["forward", "central"] = "forward"
    noise: Literal["adapt", "off"] = "adapt"
    active: bool = False
    scale: Literal["unbiased", "projection"] | None = None
    spread: Literal["even", "guide"] = "even"
    jitter: PositiveFloat = 0.1
    values: Literal["losses", "answers"] = "losses"
    direction: Literal["gradient", "gauss-newton"] = "gradient"
    damping: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _possible(self) -> EstimatorConfig:
        name = self.name
        if self.q < 1 and name != "distil":
            raise ValueError("q must be at least 1")
        if self.active and name not in ("active-cge", "orthonormal", "prior", "control-variate"):
            raise ValueError(f"active is for orthonormal directions; for {name} there is active-cge or orthonormal")
        if self.scale is not None and name not in ("orthonormal", "prior"):
            raise ValueError(f"scale is for orthonormal and prior, not for {name}")
        if self.spread != "even" and name not in ("prior", "control-variate"):
            raise ValueError(f"spread={self.spread} needs a guide: it is for prior and control-variate, not for {name}")
        if name == "distil" and (self.values != "losses" or self.direction != "gradient"):
            raise ValueError("distil estimates no derivative: leave values and direction out")
        if self.direction == "gauss-newton" and name in ("rge", "control-variate", "fo", "none"):
            raise ValueError(f"gauss-newton needs the Jacobian of cge, active-cge, orthonormal or prior, not {name}")
        return self

    @property
    def guided(self) -> bool:
        """Whether it needs a surrogate."""
        return self.name in zo.GUIDED

    @property
    def zeroth_order(self) -> bool:
        """Whether gradients are made of queries."""
        return self.name not in ("fo", "none")

    @property
    def differences(self) -> bool:
        """Whether they are made of differences between answers."""
        return self.zeroth_order and self.name != "distil"


class SurrogateConfig(_Section):
    """The local model that guides `prior`, `control-variate` and `distil` (see `surrogate`): an MLP of `depth` hidden
    layers, `steps` Adam steps of `batch` pairs after each training step, from the last `memory` pairs; `slopes` weighs
    what it learns from differences."""

    width: PositiveInt = 256
    depth: PositiveInt = 2
    lr: PositiveFloat = 1e-3
    steps: PositiveInt = 4
    batch: PositiveInt = 256
    memory: PositiveInt = 8192
    slopes: NonNegativeFloat = 0.3


class PretrainConfig(_Section):
    """White-box pre-training on mean squared error, at zero queries: first the autoencoder, then (if its epochs are not
    0) the denoiser, in front of the frozen autoencoder."""

    autoencoder_epochs: NonNegativeInt = 20
    denoiser_epochs: NonNegativeInt = 0
    batch: PositiveInt = 256
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 1e-5


Method = Literal["fixed", "sequential"]
"""How many draws a certificate takes: always n, or at most n."""

Form = Literal["auto", "merged", "factored", "images"]
"""What is sent for a query: see `black_box`."""

InFlight = Annotated[int, Field(ge=1, le=64)]
"""Requests at a time; 1 is one after the other. Of no influence on any result, and may change when a run is resumed."""


class TrainConfig(_Section):
    """Training of denoiser and encoder. `schedule`: `constant`; `cosine` to zero; `paper`: Adam for the first third of
    the epochs, then SGD at the rate `sgd_lr` (by default the same), divided by 10 for the last third (Zhang et al.,
    ICLR 2022: 200 / 200 / 200).

    `steps`: optimizer steps in all, in place of `epochs` where it is not 0; the last epoch is then cut.

    `targets`: what a noisy image is to be classified as: `oracle`, as the oracle classifies the clean one, which costs
    a query an image; `labels`, as the data set says, which costs none. Validation goes by the same.

    `micro_batch`: samples that go through the stack at once, 0 for the whole batch; batch normalization takes its
    statistics over them (see `estimation`).

    `mse`: weight of |D(x~) - x|^2, per pixel, beside the loss; it costs no query. `draws`: noisy copies of an image in
    a batch. `inner_steps`: optimizer steps for one step's answers, whose Jacobian is used again while a point stays
    within `staleness` of its length from where it was asked about. `sampling` = `loss`: images are drawn in proportion
    to their last loss, and weighted so that the gradient stays unbiased (see `sampling`)."""

    epochs: PositiveInt = 20
    steps: NonNegativeInt = 0
    batch: PositiveInt = 256
    lr: PositiveFloat = 1e-3
    sgd_lr: PositiveFloat | None = None
    schedule: Literal["constant", "cosine", "paper"] = "constant"
    weight_decay: NonNegativeFloat = 1e-5
    targets: Literal["oracle", "labels"] = "oracle"
    micro_batch: NonNegativeInt = 0
    query_rows: PositiveInt = 2048
    query_form: Form = "auto"
    in_flight: InFlight = 2
    mse: NonNegativeFloat = 0.0
    draws: PositiveInt = 1
    inner_steps: PositiveInt = 1
    staleness: PositiveFloat = 0.1
    sampling: Literal["uniform", "loss"] = "uniform"
    validate_every: PositiveInt = 1
    checkpoint_every: PositiveInt = 1

    def batches(self, images: int) -> int:
        """Optimizer steps of a whole epoch of so many images."""
        return math.ceil(images / self.batch)

    def total_steps(self, images: int) -> int:
        """Optimizer steps of the whole run."""
        return self.steps or self.epochs * self.batches(images)

    def total_epochs(self, images: int) -> int:
        """Epochs of the whole run, the last of which may be cut."""
        return math.ceil(self.total_steps(images) / self.batches(images))

    def samples(self, steps: int, images: int) -> int:
        """Samples of the first so many steps: an epoch's last batch may be smaller."""
        epochs, rest = divmod(steps, self.batches(images))
        return self.draws * (epochs * images + min(rest * self.batch, images))


class CertifyConfig(_Section):
    """Cohen et al. 2019: n0 draws choose the class, n draws bound its probability, at error alpha.

    `method`: `fixed` makes all n draws; `sequential` at most n, until each of `radii` is reached or given up
    (`sequential`). `radii`: rising, in l2, with six decimals at most, as radii are written; of no influence where n is
    fixed."""

    method: Method = "fixed"
    n0: PositiveInt = 100
    n: PositiveInt = 10_000
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.001
    radii: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (0.0, 0.25, 0.5, 0.75)
    images: NonNegativeInt = 0
    query_form: Form = "auto"
    in_flight: InFlight = 2

    @field_validator("radii")
    @classmethod
    def _sorted(cls, radii: tuple[float, ...]) -> tuple[float, ...]:
        if any(round(radius, 6) != radius for radius in radii):
            raise ValueError("a radius has six decimals at most: that is how it is written")
        return tuple(sorted(set(radii)))


class RunConfig(_Section):
    """Everything a run depends on besides the oracle and the data directory."""

    preset: str
    scale: str = FULL
    task: Literal["classification", "reconstruction"] = "classification"
    description: str = ""
    seed: NonNegativeInt = 0
    sigma: PositiveFloat = 0.25
    data: DataConfig = DataConfig()
    denoiser: DenoiserSpec = DenoiserSpec(architecture="dncnn")
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    surrogate: SurrogateConfig = SurrogateConfig()
    pretrain: PretrainConfig = PretrainConfig()
    train: TrainConfig = TrainConfig()
    certify: CertifyConfig = CertifyConfig()

    @model_validator(mode="after")
    def _trainable(self) -> RunConfig:
        if self.estimator.name != "none" and self.denoiser.architecture == "none":
            raise ValueError("there is nothing to train without a denoiser: set estimator.name=none too")
        active = self.estimator.active or self.estimator.name == "active-cge"
        if active and self.autoencoder.architecture == "none":
            raise ValueError("only what the encoder's ReLU holds at zero may be left out, and there is no encoder")
        if self.train.inner_steps > 1 and self.estimator.name in ("rge", "control-variate", "distil", "fo", "none"):
            raise ValueError(f"train.inner_steps uses a Jacobian again, and {self.estimator.name} has none")
        if self.task == "reconstruction" and self.data.augment != "none":
            raise ValueError(
                "data.augment: a back-projection that is flipped or cropped is none; a reconstruction's is 'none'"
            )
        return self


def load_preset(preset: str, settings: Sequence[str] = (), scale: str = FULL) -> RunConfig:
    """A configuration from a preset, what a scale changes in it, and `--set` changes.

    Args:
        preset: a shipped preset's name, or a path to a TOML file of the same form.
        settings: `section.key=value`; the value is read as JSON where it is JSON, else as a string.
        scale: `smoke`, `cpu` or `full`: see `scales`.

    Raises:
        ConfigError: unknown preset, scale, key or value.
    """
    path = Path(preset)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(f"no such preset file: {preset}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"preset {preset} is not valid TOML: {error}") from None
    elif preset in preset_names():
        text = preset_text(preset)
    else:
        raise ConfigError(f"no preset is called '{preset}': choose one of {', '.join(preset_names())}, or a .toml file")
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"preset {preset} is not valid TOML: {error}") from None
    values |= {"preset": path.stem if path.suffix == ".toml" else preset, "scale": scale}
    changes = parse_settings(settings)
    merge(values, changes)  # for the data set, by which a scale goes
    for scaled in _scaled(scale, path, values):
        merge(values, scaled)
    merge(values, changes)
    return _validated(values)


def _scaled(scale: str, preset: Path, values: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """What the scale changes; a preset file of the user's own has the one scale that it says."""
    if preset.suffix == ".toml":
        if scale != FULL:
            raise ConfigError(f"--scale is for the presets that are shipped: {preset} says itself how large it is")
        return ()
    data = values.get("data", {})
    dataset = data.get("dataset", DataConfig().dataset) if isinstance(data, Mapping) else ""
    return changes_of(scale, values["preset"], dataset)


def parse_settings(settings: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """`section.key=value` of an option that is given any number of times, as nested values.

    Raises:
        ConfigError: one has no value, or no section where it names one.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        _set(values, setting, option)
    return values


def _set(values: dict[str, Any], setting: str, option: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"{option} takes section.key=value, not '{setting}'")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    *sections, last = key.strip().split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{option} {setting}: '{section}' is not a section")
    target[last] = value


def _validated(values: Mapping[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("configuration: " + problems(error)) from None


def problems(error: ValidationError) -> str:
    """What a validation found, in one line."""
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        lines.append(f"{where}: {problem['msg']}" if where else problem["msg"])
    return "; ".join(lines)


def save(config: RunConfig, run: Path) -> None:
    """Write the configuration beside its run, or check that it is the one the run was started with.

    The number of requests in flight may differ, and is then written anew.

    Raises:
        ConfigError: `run` was started with other values; the message lists them.
    """
    if (run / CONFIG_FILE).exists():
        saved = load(run)
        _check_same(
            _settled(saved), _settled(config), f"{run} was started with another configuration", "choose another --out"
        )
        if saved == config:
            return
    _write(config, run / CONFIG_FILE)


def _settled(config: RunConfig) -> RunConfig:
    """A configuration but for what may change within a run: how many requests are in flight."""
    train, certify = config.train, config.certify
    return config.model_copy(
        update={
            "train": train.model_copy(update={"in_flight": 1}),
            "certify": certify.model_copy(update={"in_flight": 1}),
        }
    )


def load(run: Path) -> RunConfig:
    """The configuration a run was started with; ConfigError if `run` is not a run directory."""
    try:
        values = json.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{run} is not a run directory: it has no {CONFIG_FILE} (start one with `train`)") from None
    except ValueError as error:
        raise ConfigError(f"{run / CONFIG_FILE} is not valid JSON: {error}") from None
    return _validated(values)


def certify_settings(config: RunConfig, run: Path, changes: Mapping[str, Any]) -> CertifyConfig:
    """The settings of a certification: those it was started with, else the configuration's; then `changes`.

    Raises:
        ConfigError: values out of range, or other than those of the rows that are there already. The number of images
            may change, which only says how far to go, and that of requests in flight.
    """
    path = run / CERTIFY_FILE
    try:
        started = CertifyConfig.model_validate_json(path.read_bytes()) if path.exists() else None
        settings = CertifyConfig.model_validate((started or config.certify).model_dump() | dict(changes))
    except ValidationError as error:
        raise ConfigError(f"certification: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from None
    if "radii" in changes and settings.method == "fixed":
        raise ConfigError("certification: radii are what a sequential one aims at: use --method sequential with them")
    if started is not None:
        same = started.model_copy(update={"images": settings.images, "in_flight": settings.in_flight})
        _check_same(
            same, settings, f"{run} was certified with other settings", "move its certified.tsv and certify.json away"
        )
    return settings


def save_certify_settings(settings: CertifyConfig, run: Path) -> None:
    """Write the settings beside the rows they made."""
    _write(settings, run / CERTIFY_FILE)


def _write(values: BaseModel, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(values.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _check_same(saved: BaseModel, given: BaseModel, what: str, remedy: str) -> None:
    if saved == given:
        return
    old, new = _flat(saved.model_dump()), _flat(given.model_dump())
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old | new) if old.get(key) != new.get(key)
    ]
    raise ConfigError(f"{what} ({'; '.join(changed)}): {remedy}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class AttackConfig(_Section):
    """An attack on a run's stack: see `attack`.

    Attributes:
        method: `pgd` takes gradients of a white box, `square` asks the oracle.
        through: what `pgd` takes the gradient of: the white box behind the `defended` stack, or the `classifier` alone.
        epsilon: radius of the ball, in l2 over pixels in [0, 1].
        steps: of `pgd`; those of `square` are what its queries allow.
        step_size: of `pgd`, in l2; None for 2 epsilon / steps.
        copies: noisy draws that are averaged, with the stack's sigma; 0 is one answer without noise.
        queries_per_image: the most that an image may cost, its clean answer included.
        images: the first so many of the test set; 0 for all.
        seed: of all that is random.
        whitebox: SHA-256 of the white box's file; None where there is none.
    """

    method: Literal["pgd", "square"] = "pgd"
    through: Literal["defended", "classifier"] = "defended"
    epsilon: PositiveFloat = 1.0
    steps: PositiveInt = 40
    step_size: PositiveFloat | None = None
    copies: Annotated[int, Field(ge=0, le=1000)] = 10
    queries_per_image: PositiveInt = 5000
    images: NonNegativeInt = 100
    seed: NonNegativeInt = 0
    whitebox: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> AttackConfig:
        if self.method == "pgd" and self.whitebox is None:
            raise ValueError("pgd takes gradients: name a copy of the classifier (--whitebox), or use --method square")
        if self.method == "square" and (self.whitebox is not None or self.through != "defended"):
            raise ValueError("square asks the oracle behind the stack: leave --whitebox and --through out")
        if self.queries_per_image < self.evaluations * self.rows:
            raise ValueError(
                f"{self.method} needs {self.evaluations} answers of {self.rows} queries for an image: "
                f"queries_per_image must be at least {self.evaluations * self.rows}, not {self.queries_per_image}"
            )
        return self

    @property
    def rows(self) -> int:
        """Queries of one answer of the classifier under attack."""
        return max(self.copies, 1)

    @property
    def evaluations(self) -> int:
        """Answers that the method cannot do without: clean and attacked; for `square` clean, its start, and a step."""
        return 2 if self.method == "pgd" else 3

    @property
    def most(self) -> int:
        """Queries that an image costs at most."""
        return 2 * self.rows if self.method == "pgd" else self.queries_per_image

    @property
    def name(self) -> str:
        """Of the attack's files in the run's directory."""
        return f"attack-{self.method}-{self.through}-{self.epsilon:g}"


def attack_settings(config: RunConfig, run: Path, changes: Mapping[str, Any]) -> AttackConfig:
    """The settings of an attack: those it was started with, else the defaults and the run's seed; then `changes`.

    Raises:
        ConfigError: values out of range, or other than those of the rows that are there already. The number of images
            may change, which only says how far to go.
    """
    try:
        settings = AttackConfig.model_validate({"seed": config.seed} | dict(changes))
        path = run / f"{settings.name}.json"
        started = AttackConfig.model_validate_json(path.read_bytes()) if path.exists() else None
        if started is not None:
            settings = AttackConfig.model_validate(started.model_dump() | dict(changes))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = "".join(f"{part}: " for part in problem["loc"])
        raise ConfigError(f"attack: {where}{problem['msg']}") from None
    if started is not None:
        same = started.model_copy(update={"images": settings.images})
        remedy = f"move its {settings.name}.tsv and {settings.name}.json away"
        _check_same(same, settings, f"{run} was attacked with other settings", remedy)
    return settings


def save_attack_settings(settings: AttackConfig, run: Path) -> None:
    """Write the settings beside the rows they made."""
    _write(settings, run / f"{settings.name}.json")
