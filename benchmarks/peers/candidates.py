"""Who takes part: how each is served, and who asks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EAGER_AS_RUN = "eager PyTorch in process, as people run it"
EAGER = "eager PyTorch in process, allocator as ours"
OURS = "ours, RemoteOracle"
_SERVERS = "benchmarks.peers.servers"


@dataclass(frozen=True)
class InProcess:
    """A classifier in a process of its own. `arguments` of `benchmarks.in_process`."""

    name: str
    arguments: Sequence[str]


@dataclass(frozen=True)
class Ours:
    """Our server. `client` of `benchmarks.peers.clients`."""

    name: str
    client: str


@dataclass(frozen=True)
class Peer:
    """Another framework's server.

    Attributes:
        environment: of `environments.PACKAGES`.
        command: `python -m` this; {port} is the port.
        health: route that answers 200 once it serves.
        route: where it is asked.
        client: of `benchmarks.peers.clients`.
        own_client: whether the client needs the framework's environment.
    """

    name: str
    environment: str
    command: Sequence[str]
    health: str
    route: str
    client: str
    own_client: bool = False


Candidate = InProcess | Ours | Peer

_FASTAPI = (f"{_SERVERS}.fastapi_app", "{port}")
_BENTOML = ("bentoml", "serve", f"{_SERVERS}.bentoml_service:Served", "--host", "127.0.0.1", "--port", "{port}")

CANDIDATES: Sequence[Candidate] = (
    InProcess(EAGER_AS_RUN, ("eager", "--malloc", "default")),
    InProcess(EAGER, ("eager",)),
    InProcess("ONNX Runtime in process", ("onnxruntime",)),
    InProcess("our engine in process", ("engine",)),
    Ours(OURS, "remote_oracle"),
    Ours("ours, unmodified tritonclient", "tritonclient"),
    Peer("FastAPI, raw bytes", "fastapi", _FASTAPI, "/health", "/raw", "raw_bytes"),
    Peer("FastAPI, JSON lists", "fastapi", _FASTAPI, "/health", "/json", "json_lists"),
    Peer(
        "LitServe, raw bytes",
        "litserve",
        (f"{_SERVERS}.litserve_app", "{port}", "raw"),
        "/health",
        "/predict",
        "raw_bytes",
    ),
    Peer(
        "LitServe, JSON lists",
        "litserve",
        (f"{_SERVERS}.litserve_app", "{port}", "json"),
        "/health",
        "/predict",
        "json_lists",
    ),
    Peer(
        "MLServer, JSON",
        "mlserver",
        (f"{_SERVERS}.mlserver_runtime", "{port}"),
        "/v2/models/classifier/ready",
        "/v2/models/classifier/infer",
        "oip_json",
    ),
    Peer("BentoML, numpy", "bentoml", _BENTOML, "/readyz", "", "bentoml", own_client=True),
)
