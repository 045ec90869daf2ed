"""FastAPI on uvicorn: JSON lists by a pydantic model, and raw bytes. `python -m ... PORT`."""

from __future__ import annotations

import sys

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from benchmarks.peers.servers.classifier import Classifier

app = FastAPI()
classifier = Classifier()


class Images(BaseModel):
    images: list[list[list[list[float]]]]


@app.get("/health")
def health() -> str:
    return "ok"


@app.post("/json")
def predict_json(body: Images) -> dict[str, list[list[float]]]:
    return {"logits": classifier(np.array(body.images, dtype=np.float32)).tolist()}


@app.post("/raw")
async def predict_raw(request: Request) -> Response:
    images = np.frombuffer(bytearray(await request.body()), dtype=np.float32).reshape(-1, 3, 32, 32)
    logits = await run_in_threadpool(classifier, images)
    return Response(logits.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
