"""One client a kind of server: a batch, one request at a time, over one connection.

    python -m benchmarks.peers.clients KIND --url URL --images FILE [--expected FILE]

A worker (see `measuring.obey`). Each kind asks as its server's users do; the key of ours is in ORACLE_API_KEY.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Ask = Callable[[np.ndarray], np.ndarray]

_TIMEOUT_S = 600.0


def json_lists(url: str) -> Ask:
    """POST {"images": nested lists} -> {"logits": nested lists}."""
    import httpx
    import numpy as np

    http = httpx.Client(timeout=_TIMEOUT_S)

    def ask(images: np.ndarray) -> np.ndarray:
        answer = http.post(url, json={"images": images.tolist()}).raise_for_status()
        return np.array(answer.json()["logits"], dtype=np.float32)

    return ask


def raw_bytes(url: str) -> Ask:
    """POST the array's bytes -> the logits' bytes."""
    import httpx
    import numpy as np

    http = httpx.Client(timeout=_TIMEOUT_S, headers={"Content-Type": "application/octet-stream"})

    def ask(images: np.ndarray) -> np.ndarray:
        answer = http.post(url, content=images.tobytes()).raise_for_status()
        return np.frombuffer(answer.content, dtype=np.float32).reshape(len(images), -1)

    return ask


def oip_json(url: str) -> Ask:
    """The Open Inference Protocol, all of it JSON."""
    import httpx
    import numpy as np

    http = httpx.Client(timeout=_TIMEOUT_S)

    def ask(images: np.ndarray) -> np.ndarray:
        tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
        answer = http.post(url, json={"inputs": [tensor]}).raise_for_status()
        output = answer.json()["outputs"][0]
        return np.array(output["data"], dtype=np.float32).reshape(output["shape"])

    return ask


def bentoml(url: str) -> Ask:
    """BentoML's own client, which needs its environment."""
    import bentoml as framework
    import numpy as np

    client = framework.SyncHTTPClient(url, timeout=_TIMEOUT_S)

    def ask(images: np.ndarray) -> np.ndarray:
        return np.asarray(client.call("predict", images=images), dtype=np.float32)

    return ask


def remote_oracle(url: str) -> Ask:
    """Our own client."""

    from defender_client.oracle_client import RemoteOracle

    oracle, labels = RemoteOracle(url, os.environ["ORACLE_API_KEY"]), itertools.count()

    def ask(images: np.ndarray) -> np.ndarray:
        return oracle.query(images, purpose="benchmark", label=str(next(labels)))

    return ask


def tritonclient(url: str) -> Ask:
    """NVIDIA's client, unmodified, with binary tensors."""
    import tritonclient.http as triton

    client = triton.InferenceServerClient(
        url.removeprefix("http://"), network_timeout=_TIMEOUT_S, connection_timeout=_TIMEOUT_S
    )
    headers = {"Authorization": f"Bearer {os.environ['ORACLE_API_KEY']}"}

    def ask(images: np.ndarray) -> np.ndarray:
        tensor = triton.InferInput("images", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images, binary_data=True)
        logits: np.ndarray = client.infer("classifier", [tensor], headers=headers).as_numpy("logits")
        return logits

    return ask


KINDS: dict[str, Callable[[str], Ask]] = {
    kind.__name__: kind for kind in (json_lists, raw_bytes, oip_json, bentoml, remote_oracle, tritonclient)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--url", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--expected", type=Path)
    options = parser.parse_args()
    from shared.process import prepare

    prepare()
    import numpy as np

    from benchmarks.in_process import check
    from benchmarks.measuring import Work, obey

    def make_ready() -> tuple[Work, str]:
        ask, images = KINDS[options.kind](options.url), np.load(options.images)
        check(ask(images), options.expected)

        def work(batches: int) -> None:
            for _ in range(batches):
                ask(images)

        return work, options.kind

    obey(make_ready)


if __name__ == "__main__":
    main()
