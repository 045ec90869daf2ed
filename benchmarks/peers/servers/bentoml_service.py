"""BentoML: numpy arrays in and out. `python -m bentoml serve benchmarks.peers.servers.bentoml_service:Served`."""

import bentoml
import numpy as np

from benchmarks.peers.servers.classifier import Classifier


@bentoml.service(workers=1, traffic={"timeout": 600})
class Served:
    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api
    def predict(self, images: np.ndarray) -> np.ndarray:
        return self.classifier(np.ascontiguousarray(images, dtype=np.float32))
