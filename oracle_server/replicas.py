"""How many replicas of an oracle there are, what each may take, and which settings all of them share.

Nothing here needs Ray: `ray_app` hands it over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from oracle_server.database import ledger_file, parse_url
from oracle_server.policy.spec import load_policy
from oracle_server.settings import Settings

_MARGIN_S = 10.0  # after the requests inside have had their time: for closing the ledger


class ReplicasError(Exception):
    """These replicas cannot be; the message says what to change."""


class Replicas(BaseModel):
    """Replicas of one oracle.

    Attributes:
        replicas: a fixed number of them; 1 where neither this nor `max_replicas` is given.
        min_replicas, max_replicas: or as many as there is work for, between these.
        target_ongoing_requests: requests that each should have under way, with `max_replicas`.
        max_ongoing_requests: that are passed to a replica at once; others wait in Ray's proxy. By default twice
            `max_queue_requests`, so that a full replica refuses by itself, fairly and with Retry-After.
        num_cpus, num_gpus: what Ray sets aside for each; cores are also the engine's threads.
        health_check_period: seconds between two looks at a replica; after three failures it is replaced.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: PositiveInt | None = None
    min_replicas: PositiveInt | None = None
    max_replicas: PositiveInt | None = None
    target_ongoing_requests: PositiveFloat | None = None
    max_ongoing_requests: PositiveInt | None = None
    num_cpus: PositiveFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0
    health_check_period: PositiveFloat = 10.0

    @property
    def most(self) -> int:
        """The most replicas there may be."""
        return self.max_replicas or self.replicas or 1

    def check(self, settings: Settings, *, one_machine: bool) -> None:
        """Whether these replicas can serve this.

        Raises:
            ReplicasError: they cannot.
            LedgerError: the ledger's URL cannot be used.
            PolicyError: the policy cannot.
        """
        if self.max_replicas is None:
            if self.min_replicas is not None or self.target_ongoing_requests is not None:
                raise ReplicasError("min-replicas and target-ongoing-requests are for autoscaling: give max-replicas")
        elif self.replicas is not None:
            raise ReplicasError("give replicas for a fixed number, or max-replicas for autoscaling, not both")
        elif (self.min_replicas or 1) > self.max_replicas:
            raise ReplicasError(f"min-replicas {self.min_replicas} is more than max-replicas {self.max_replicas}")
        if ledger_file(parse_url(settings.ledger)) is not None and (self.most > 1 or not one_machine):
            raise ReplicasError(
                "replicas charge on one ledger wherever they run, and a SQLite file lies on one machine: "
                "use --ledger postgresql://... (or one replica, on this machine)"
            )
        spec = load_policy(settings.policy, settings.task)
        if self.most > 1 and spec.answers.noise is not None and spec.seed is None:
            raise ReplicasError(
                f"the policy {settings.policy} has noise and no seed: each replica would draw its own, and noise could "
                "be averaged away by asking again for free; give it a seed"
            )
        if self.most > 1 and settings.smooth is not None and settings.smooth_seed is None:
            raise ReplicasError(
                "--smooth without --smooth-seed: each replica would draw its own noise, and an image's answer would "
                "depend on which of them is asked; give a seed"
            )

    def deployment(self, settings: Settings) -> dict[str, Any]:
        """Keywords of `ray.serve.deployment`."""
        options: dict[str, Any] = {
            "name": "Oracle",
            "logging_config": {"enable_access_log": False},  # a line for each request, on its way through two files
            "max_ongoing_requests": self.max_ongoing_requests or 2 * settings.max_queue_requests,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
            "health_check_period_s": self.health_check_period,
            "health_check_timeout_s": 3 * settings.ledger_timeout,
            "graceful_shutdown_wait_loop_s": 0.5,
            # Ray's wait for the requests that it knows of, and ours for those whose clients have gone.
            "graceful_shutdown_timeout_s": 2 * settings.drain_timeout + _MARGIN_S,
        }
        if self.max_replicas is None:
            return options | {"num_replicas": self.most}
        scaling: dict[str, Any] = {"min_replicas": self.min_replicas or 1, "max_replicas": self.max_replicas}
        if self.target_ongoing_requests is not None:
            scaling["target_ongoing_requests"] = self.target_ongoing_requests
        return options | {"autoscaling_config": scaling}


def shared_settings(settings: Settings) -> dict[str, Any]:
    """What every replica is given: all settings, as JSON has them, paths absolute, and decoders known to all."""
    given = settings.model_dump(mode="json")
    for name, value in settings:
        if isinstance(value, Path):
            given[name] = str(value.absolute())
    for name in ("model", "weights"):  # which may be files, or names
        value = given[name]
        if value is not None and Path(value).is_file():
            given[name] = str(Path(value).absolute())
    file = ledger_file(parse_url(settings.ledger))
    if file is not None:
        given["ledger"] = f"sqlite:///{file.absolute()}"
    elif settings.signing_key is None:
        given["signing_key"] = str(Path("oracle-ledger.key").absolute())
    return given | {"share_decoders": True}


def read_replicas(**given: Any) -> Replicas:
    """Replicas as options say them; None is for what was not said. Raises `ReplicasError` for what cannot be."""
    try:
        return Replicas(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise _told(error) from None


def read(given: Mapping[str, Any]) -> tuple[Settings, Replicas]:
    """Both from one set of names: those of `Replicas`, and for the rest those of `Settings`.

    Raises:
        ReplicasError: a name that neither has, or a value that cannot be.
    """
    names = Replicas.model_fields.keys()
    unknown = sorted(given.keys() - names - Settings.model_fields.keys())
    if unknown:
        raise ReplicasError(f"no such setting: {', '.join(unknown)}")
    replicas = read_replicas(**{name: value for name, value in given.items() if name in names})
    try:
        return Settings(**{name: value for name, value in given.items() if name not in names}), replicas
    except ValidationError as error:
        raise _told(error) from None


def _told(error: ValidationError) -> ReplicasError:
    first = error.errors()[0]
    return ReplicasError(f"{'.'.join(map(str, first['loc'])).replace('_', '-')}: {first['msg']}")
