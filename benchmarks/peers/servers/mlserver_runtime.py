"""MLServer: a runtime of one's own, the Open Inference Protocol in JSON. `python -m ... PORT` writes its folder, and
starts it."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.peers.servers.classifier import Classifier


class Runtime(MLModel):
    async def load(self) -> bool:
        self.classifier = Classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = NumpyCodec.decode_input(payload.inputs[0])
        logits = self.classifier(np.ascontiguousarray(images, dtype=np.float32))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("logits", logits)])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _main() -> None:
    from mlserver.cli import main

    with tempfile.TemporaryDirectory() as folder:
        grpc, metrics = _free_ports(2)
        settings = {"host": "127.0.0.1", "http_port": int(sys.argv[1]), "grpc_port": grpc, "metrics_port": metrics}
        Path(folder, "settings.json").write_text(json.dumps({**settings, "debug": False}))
        implementation = "benchmarks.peers.servers.mlserver_runtime.Runtime"
        model = {"name": "classifier", "implementation": implementation}
        Path(folder, "model-settings.json").write_text(json.dumps(model))
        os.chdir(folder)
        sys.argv = ["mlserver", "start", folder]
        main()


if __name__ == "__main__":
    _main()
