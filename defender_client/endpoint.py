"""How an oracle that is not ours is asked: a frozen description, from a TOML file or from options.

    v2      a server of the Open Inference Protocol v2 (KServe, Triton, MLServer, ...); what its metadata says is taken
            from there, and what is said here comes first
    json    an endpoint that takes images somewhere in a JSON object and answers with scores somewhere in another
    python  a callable in this process

Keys are in none of them: `header_env` names the environment variables that hold them.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError, model_validator

from defender_client.config import problems
from defender_client.errors import ConfigError
from defender_client.oracle import Scores
from defender_client.scales import merge
from shared.audit.chain import canonical_json

Layout = Literal["nchw", "nhwc", "flat"]
Datatype = Literal["FP16", "FP32", "FP64", "UINT8"]
Factors = tuple[float, ...] | float

PYTHON_PREFIX = "python:"
DEFAULT_ROWS = 256
_MODEL_PATH = re.compile(r"(?P<server>.*)/v2/models/(?P<model>[^/?#]+)(/versions/(?P<version>[^/?#]+))?(/infer)?/?")
# What may change while a run goes on: where it is, and how it is reached.
_NOT_IDENTITY = {"url", "header_env", "rows", "binary"}


class _Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Endpoint(_Described):
    """What they have in common.

    Attributes:
        shape: (c, h, w) of an image.
        classes: number of classes.
        layout: of images on the wire; flat is c, h, w in one dimension.
        mean, std: (x - mean) / std is sent of pixels x in [0, 1]; one number, or one a channel.
        scores: what the answers are.
        rows: images of a request, at most.
    """

    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    classes: PositiveInt | None = None
    layout: Layout | None = None
    mean: Factors = 0.0
    std: Factors = 1.0
    scores: Scores = "logits"
    rows: PositiveInt = DEFAULT_ROWS

    @model_validator(mode="after")
    def _divisible(self) -> _Endpoint:
        if not all(each > 0 for each in _each(self.std)):
            raise ValueError("std must be greater than 0")
        channels = {len(factors) for factors in (self.mean, self.std) if isinstance(factors, tuple)}
        if channels and (len(channels) > 1 or (self.shape is not None and channels != {self.shape[0]})):
            raise ValueError("mean and std have one number, or one for each channel")
        return self

    @property
    def normalises(self) -> bool:
        """Whether anything other than pixels in [0, 1] is sent."""
        return any(_each(self.mean)) or any(each != 1 for each in _each(self.std))

    @property
    def identity(self) -> str:
        """A digest of how images are put to it and what comes back: what must not change within a run."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json", exclude=_NOT_IDENTITY))).hexdigest()[:32]


class V2Endpoint(_Endpoint):
    """A model on a server of the Open Inference Protocol v2.

    Attributes:
        url: the server's address, without a route.
        model, version: whose metadata is `/v2/models/MODEL[/versions/VERSION]`.
        input, output: names of the tensors; by default the only ones that the metadata names.
        datatype: of the input; by default as the metadata says.
        binary: whether tensors travel as bytes; by default where the server says it has `binary_tensor_data`.
        header_env: headers to send, each with the environment variable that holds its value.
    """

    protocol: Literal["v2"] = "v2"
    url: str
    model: str
    version: str | None = None
    input: str | None = None
    output: str | None = None
    datatype: Datatype | None = None
    binary: bool | None = None
    header_env: dict[str, str] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called in messages and in the ledger."""
        return f"{self.url}/v2/models/{self.model}"


class JsonRequest(_Described):
    """Where images go.

    Attributes:
        images: dotted path of the field that takes them.
        encoding: numbers in nested lists, or PNG files in base64.
        single: the field takes one image and no list of images; a request then has one row.
        fields: what else the object holds.
    """

    images: str
    encoding: Literal["numbers", "png"] = "numbers"
    single: bool = False
    fields: dict[str, Any] = Field(default_factory=dict)


class JsonAnswer(_Described):
    """Where scores are.

    Attributes:
        scores: dotted path of a list with one element an image; what stands behind a `*` is looked up in each element.
            A number is an index. Empty where the answer is that list itself.
        labels: the classes' names in order, where an image's scores are an object NAME: SCORE or a list of objects.
        label, score: the fields of such objects.
    """

    scores: str = ""
    labels: tuple[str, ...] | None = None
    label: str = "label"
    score: str = "score"


class JsonEndpoint(_Endpoint):
    """An endpoint that speaks JSON of its own: POST, one object there and one back."""

    protocol: Literal["json"]
    url: str
    header_env: dict[str, str] = Field(default_factory=dict)
    request: JsonRequest
    answer: JsonAnswer = JsonAnswer()

    @model_validator(mode="after")
    def _complete(self) -> JsonEndpoint:
        if self.shape is None:
            raise ValueError("shape = [c, h, w] is needed: nothing else says what images it takes")
        if self.classes is None and self.answer.labels is None:
            raise ValueError("classes = N (or answer.labels) is needed: nothing else says how many there are")
        if self.answer.labels is not None and self.classes not in (None, len(self.answer.labels)):
            raise ValueError(f"classes = {self.classes}, and answer.labels names {len(self.answer.labels)}")
        if self.request.encoding == "png" and (self.normalises or self.shape[0] not in (1, 3)):
            raise ValueError("a PNG holds pixels of 1 or 3 channels: no mean, no std")
        return self

    @property
    def name(self) -> str:
        """What it is called in messages and in the ledger."""
        return self.url


class PythonEndpoint(_Endpoint):
    """A callable in this process: images float32 [n, c, h, w] in [0, 1] -> scores [n, k], or labels [n]. Asked by one
    thread at a time. `callable` is MODULE:NAME, found as Python does, from the working directory on."""

    protocol: Literal["python"]
    callable: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]

    @property
    def name(self) -> str:
        """What it is called in messages and in the ledger."""
        return f"{PYTHON_PREFIX}{self.callable}"


Endpoint = V2Endpoint | JsonEndpoint | PythonEndpoint
_ENDPOINTS: TypeAdapter[Endpoint] = TypeAdapter(Annotated[Endpoint, Field(discriminator="protocol")])


def described(oracle: str, changes: Mapping[str, Any]) -> Endpoint | None:
    """The endpoint that `--oracle` names: a .toml file, python:MODULE:NAME, or the address of a model; None for the
    address of a server, of which the server must say more.

    Args:
        oracle: as given.
        changes: values that come before those of the file.

    Raises:
        ConfigError: the file cannot be read, or the values describe no endpoint.
    """
    if oracle.endswith(".toml"):
        values = _read(Path(oracle))
        values.setdefault("protocol", "v2")
    elif oracle.startswith(PYTHON_PREFIX):
        values = {"protocol": "python", "callable": oracle.removeprefix(PYTHON_PREFIX)}
    else:
        values = {"protocol": "v2", "url": oracle}
    merge(values, changes)
    if values["protocol"] == "v2":
        if "/v2/models/" in str(values.get("url", "")):
            _check_url(str(values["url"]))
        values = _located(values)
        if "model" not in values and not oracle.endswith(".toml"):
            return None
    if "url" in values:
        _check_url(str(values["url"]))
    try:
        return _ENDPOINTS.validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"--oracle {oracle}: {problems(error)}") from None


def _located(values: dict[str, Any]) -> dict[str, Any]:
    """Model and version out of the address, where it names them."""
    matched = _MODEL_PATH.fullmatch(str(values.get("url", "")))
    if matched is None:
        return values
    found = {"model": matched["model"], "version": matched["version"]}
    return {**{name: value for name, value in found.items() if value}, **values, "url": matched["server"]}


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"'{url.partition('?')[0]}' is not an address: write http://HOST:PORT")
    if "@" in url or "?" in url:
        # Not shown: an address is printed and kept, so a key must not be in it.
        raise ConfigError("an endpoint's address has no user, password or query: keys go into header_env")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the endpoint's file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the endpoint's file {path} is not valid TOML: {error}") from None


def _each(factors: Factors) -> tuple[float, ...]:
    return factors if isinstance(factors, tuple) else (factors,)
