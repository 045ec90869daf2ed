"""LitServe: JSON lists, or raw bytes. `python -m ... PORT json|raw`.

LitServe takes the types of bodies from these signatures as they are: annotations that are strings it does not read.
"""

import sys
from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body, Request, Response

from benchmarks.peers.servers.classifier import Classifier


class Json(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.classifier = Classifier()

    def decode_request(self, request: Request) -> np.ndarray:
        body: Any = request  # LitServe has parsed its JSON
        return np.array(body["images"], dtype=np.float32)

    def predict(self, images: np.ndarray) -> np.ndarray:
        return self.classifier(images)

    def encode_response(self, logits: np.ndarray) -> dict[str, list[list[float]]]:
        return {"logits": logits.tolist()}


class Raw(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.classifier = Classifier()

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> np.ndarray:
        return np.frombuffer(bytearray(request), dtype=np.float32).reshape(-1, 3, 32, 32)

    def predict(self, images: np.ndarray) -> np.ndarray:
        return self.classifier(images)

    def encode_response(self, logits: np.ndarray) -> Response:
        return Response(logits.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    server = litserve.LitServer(Json() if sys.argv[2] == "json" else Raw(), accelerator="cpu", timeout=600)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
