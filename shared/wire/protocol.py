"""Names and messages of the wire: Open Inference Protocol v2 with the binary tensor extension.

Source: the Open Inference Protocol specification (KServe / Triton), "Inference Protocol, HTTP/REST" and
"Binary Tensor Data Extension". Messages are validated when built and used alike by client and server.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MODEL_NAME: Final = "classifier"
MODEL_VERSION: Final = "1"
INPUT_NAME: Final = "images"
OUTPUT_NAME: Final = "logits"  # a classifier's
RECONSTRUCTION_NAME: Final = "reconstruction"  # a reconstructor's
LATENTS_NAME: Final = "latents"  # an input instead of images, of a registered decoder
BINARY_EXTENSION: Final = "binary_tensor_data"

# Header names. HTTP compares them without regard to case.
JSON_LENGTH_HEADER: Final = "Inference-Header-Content-Length"
IDEMPOTENCY_KEY_HEADER: Final = "Idempotency-Key"
QUERY_CHARGE_HEADER: Final = "Query-Charge"
QUERY_REMAINING_HEADER: Final = "Query-Remaining"
QUERY_RECEIPT_HEADER: Final = "Query-Receipt"
# draft-ietf-httpapi-ratelimit-headers: `"name";r=REMAINING;t=SECONDS`, one member for each limit.
RATELIMIT_HEADER: Final = "RateLimit"
# Of the same draft: `"name";q=QUOTA;w=SECONDS`.
RATELIMIT_POLICY_HEADER: Final = "RateLimit-Policy"

BUDGET_ROUTE: Final = "/v1/budget"
CHARGES_ROUTE: Final = "/v1/charges"
DECODERS_ROUTE: Final = "/v1/decoders"
LEDGER_ROUTE: Final = "/v1/ledger"
METRICS_ROUTE: Final = "/metrics"
INFER_ROUTE: Final = f"/v2/models/{MODEL_NAME}/infer"
METADATA_ROUTE: Final = f"/v2/models/{MODEL_NAME}"

# Parameters in the model's metadata: most rows of a batch; what an answer holds where it is not logits.
MAX_BATCH_ROWS_PARAMETER: Final = "max_batch_rows"
SCORES_PARAMETER: Final = "scores"
# Where the model is a smoothed classifier: how (sigma, draws, alpha), and whether a row of zeros is an abstention.
SMOOTHING_PARAMETER: Final = "smoothing"
ABSTAINS_PARAMETER: Final = "abstains"
# Where the model is a reconstructor: that it is one, and how its images are measured (`shared.measurements`).
TASK_PARAMETER: Final = "task"
MEASUREMENT_PARAMETER: Final = "measurement"
# And where decoders may be registered: that they may, and within which limits.
DECODERS_PARAMETER: Final = "decoders"
MAX_DECODER_BYTES_PARAMETER: Final = "max_decoder_bytes"
MAX_DECODER_LAYERS_PARAMETER: Final = "max_decoder_layers"
MAX_DECODER_ACTIVATIONS_PARAMETER: Final = "max_decoder_activations"
MAX_DECODER_MULTIPLY_ADDS_PARAMETER: Final = "max_decoder_multiply_adds"
MAX_CLIENT_DECODERS_PARAMETER: Final = "max_client_decoders"

FACTORED_PARAMETER: Final = "factored"  # true where factored query batches are read
COUNTS_PARAMETER: Final = "counts"  # true where they may be ragged: a number of directions for each point
# Parameters of a request: which decoder its points are latents of; whether pixels are clamped to [0, 1].
DECODER_PARAMETER: Final = "decoder"
CLAMP_PARAMETER: Final = "clamp"

MAX_IDEMPOTENCY_KEY: Final = 255
CHARGES_PAGE: Final = 1000

# Datatype -> numpy dtype on the wire, always little-endian. BF16 has no numpy dtype: its 16 bits travel as uint16
# and are widened to float32 when read. BYTES has no fixed item size and no place in an image classifier.
DATATYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
}

Task = Literal["classification", "reconstruction"]
# What the one output is called. The model's own name does not depend on it.
OUTPUT_NAMES: Final[dict[Task, str]] = {"classification": OUTPUT_NAME, "reconstruction": RECONSTRUCTION_NAME}

Dimension = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]


class Message(BaseModel):
    """A message of the wire: frozen, validated when built; unknown fields are ignored, as the protocol asks."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TensorHeader(Message):
    """One tensor in the JSON part: its bytes follow (`binary_data_size`) or its values stand in `data`."""

    name: str
    shape: Annotated[tuple[Dimension, ...], Field(max_length=16)]
    datatype: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: Any = None


class RequestedOutput(Message):
    """An output the client asks for by name."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferRequestHeader(Message):
    """The JSON part of an inference request."""

    id: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: tuple[TensorHeader, ...]
    outputs: tuple[RequestedOutput, ...] = ()


# KServe's own server sends null for parameters that it has not.
_Parameters = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]


class AnsweredTensorHeader(TensorHeader):
    """One tensor of an answer."""

    parameters: _Parameters = Field(default_factory=dict)


class InferResponseHeader(Message):
    """The JSON part of an inference response."""

    model_name: str = ""
    model_version: str | None = None
    id: str | None = None
    parameters: _Parameters = Field(default_factory=dict)
    outputs: tuple[AnsweredTensorHeader, ...]


class TensorMetadata(Message):
    """A tensor as the model's metadata declares it; -1 stands for any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(Message):
    """`GET /v2/models/{model}`."""

    name: str
    versions: tuple[str, ...] = ()
    platform: str = ""
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    parameters: dict[str, Any] = Field(default_factory=dict)


class ServerMetadata(Message):
    """`GET /v2`."""

    name: str
    version: str
    extensions: tuple[str, ...] = ()


class BudgetStatement(Message):
    """`GET /v1/budget`: the caller's own account, in queries (one query is one row through the classifier)."""

    client: str
    budget: int
    spent: int
    held: int = 0  # set aside for requests in flight
    remaining: int


class DecoderStatement(Message):
    """A decoder of the caller's: `POST /v1/decoders` answers with it, and queries name it by `decoder`."""

    decoder: str  # 32 hexadecimal digits, of its content: registered again, the same
    latent: int
    image_shape: tuple[int, int, int]
    bytes: int  # of its weights


class DecoderList(Message):
    """`GET /v1/decoders`: the caller's own, the one used last at the end."""

    client: str
    decoders: tuple[DecoderStatement, ...]


class LedgerStatement(Message):
    """`GET /v1/ledger`: which ledger it is, and the end of its hash chain as the key signed it.

    All but `seq` and `at` is hexadecimal. The signature is Ed25519's, of `shared.audit.signatures.Head.message()`.
    """

    ledger: str
    public_key: str
    seq: int
    hash: str
    at: str
    signature: str


class ChargeEntry(Message):
    """One ledger entry of the caller's, as `GET /v1/charges` returns it. `rows` is negative for a refund."""

    seq: int
    at: str
    kind: str
    rows: int
    idempotency_key: str | None = None
    body_sha256: str | None = None


class ChargePage(Message):
    """A page of the caller's ledger entries, oldest first; `next_after` is None on the last page."""

    client: str
    entries: tuple[ChargeEntry, ...]
    next_after: int | None = None
