"""The server's settings: read once by the CLI, frozen, and passed down."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.wire.protocol import Task

KIB, MIB = 2**10, 2**20
MOST_DRAWS = 10_000
USUAL_MODELS: dict[Task, str] = {"classification": "digits-cnn", "reconstruction": "small-reconstructor"}


class Settings(BaseSettings):
    """What is served, where, and within which limits. Each can be set by an environment variable, `ORACLE_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="ORACLE_", frozen=True, extra="ignore")

    # The model
    task: Task = "classification"
    model: str | None = None  # by default the task's: see `model_name`; its forms: docs/any-classifier.md
    weights: str | None = None  # a file, or the name of the library's own weights
    preprocessing: Path | None = None  # TOML: size, mean, std, layout, ... in front of a classifier
    # What a classifier's weights do not say
    classes: PositiveInt | None = None
    channels: PositiveInt | None = None
    image_size: PositiveInt | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None

    # What stands in front of it: see docs/library.md
    defence: Path | None = None  # an exported stack, or its manifest
    smooth: Annotated[int, Field(ge=1, le=MOST_DRAWS)] | None = None  # noisy copies of an image that vote
    smooth_alpha: Annotated[float, Field(gt=0, lt=1)] | None = None  # abstain, at this error
    smooth_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None  # a secret; by default new at each start

    # How it is computed
    engine: Literal["auto", "eager", "compile", "onnxruntime"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    tf32: bool = False  # on CUDA: products of float32 with 10 bits after the point
    engine_block: PositiveInt | None = None  # most rows a thread computes at once; by default as measured
    engine_cache: Path | None = None  # a folder for what was measured; by default the user's cache
    batch_wait: Annotated[float, Field(ge=0)] = 0.0  # milliseconds an idle engine waits for company

    # Where it is served, and where queries are counted
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8600  # 0: any free port
    ledger: str = "sqlite:///oracle-ledger.db"
    signing_key: Path | None = None  # by default beside the ledger
    ledger_timeout: PositiveFloat = 10.0  # seconds to wait for the ledger's database

    # TLS: both files or neither
    tls_cert: Path | None = None  # PEM: the server's certificate, then those that vouch for it
    tls_key: Path | None = None  # PEM: its private key
    tls_key_password_file: Path | None = None

    # Who sees what
    metrics_access: Literal["open", "keyed"] = "open"
    log_level: Literal["debug", "info", "warning"] = "info"

    # Limits
    max_connections: PositiveInt = 512
    max_header_bytes: Annotated[int, Field(ge=1024)] = 64 * KIB  # of a request's line and headers together
    max_headers: PositiveInt = 100
    header_timeout: PositiveFloat = 30.0  # seconds for a request's head to arrive
    max_batch_rows: PositiveInt = 4096
    # Of all requests that were let in and are not answered yet. A client may have half of each: four of the largest
    # batches (computed, next, decoded, on the wire), or as many requests of one row as fill a block.
    max_queue_rows: PositiveInt = 32768
    max_queue_requests: PositiveInt = 512
    max_body_bytes: PositiveInt = 256 * MIB
    max_bodies_bytes: PositiveInt = 1024 * MIB  # of all requests in flight together
    body_timeout: PositiveFloat = 60.0  # seconds for a whole body to arrive
    drain_timeout: PositiveFloat = 30.0  # seconds for requests in flight to finish after SIGTERM

    # Decoders that clients register: see docs/decoders.md. Rows are of one latent
    allow_decoders: bool = False
    max_decoder_bytes: PositiveInt = 32 * MIB
    max_decoder_layers: PositiveInt = 64
    max_decoder_activations: PositiveInt = 4 * MIB  # elements of a row in memory at once
    max_decoder_multiply_adds: PositiveInt = 256 * MIB  # of a row
    max_client_decoders: PositiveInt = 4
    max_decoders: PositiveInt = 64  # of all clients together
    max_decoders_bytes: PositiveInt = 256 * MIB
    share_decoders: bool = False  # through the ledger's database, with whatever other servers use it

    # What a real service does: see docs/policy.md
    policy: Path | None = None

    @model_validator(mode="after")
    def _smoothed(self) -> Settings:
        if self.smooth is not None and self.defence is None:
            raise ValueError("--smooth needs --defence, whose manifest says how much noise its stack was trained for")
        if self.smooth is not None and self.task != "classification":
            raise ValueError("--smooth is a vote between classes, and --task reconstruction has none: leave it out")
        idle = [name for name in ("smooth_alpha", "smooth_seed") if getattr(self, name) is not None]
        if self.smooth is None and idle:
            raise ValueError(f"--{idle[0].replace('_', '-')} is of a vote: give --smooth, too")
        return self

    @property
    def model_name(self) -> str:
        """What is served, as it was named."""
        return self.model or USUAL_MODELS[self.task]
