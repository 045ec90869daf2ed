"""The unmodified client of another project, sync and asyncio, against the live server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from oracle_support import Caller, Running, digits, logits_of
from tritonclient.utils import InferenceServerException

from shared.wire import protocol


@pytest.fixture
def client(server: Running) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.address) as opened:
        yield opened


def make_input(images: np.ndarray, *, binary: bool = True, module: object = triton) -> triton.InferInput:
    made = module.InferInput(protocol.INPUT_NAME, list(images.shape), "FP32")  # type: ignore[attr-defined]
    made.set_data_from_numpy(images, binary_data=binary)
    return made


def test_it_finds_what_it_looks_for(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(protocol.MODEL_NAME)
    assert client.is_model_ready(protocol.MODEL_NAME, protocol.MODEL_VERSION)
    assert protocol.BINARY_EXTENSION in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata(protocol.MODEL_NAME)["inputs"][0]["shape"] == [-1, 1, 8, 8]
    assert client.get_model_repository_index()[0]["name"] == protocol.MODEL_NAME


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_it_gets_the_logits(
    client: triton.InferenceServerClient,
    caller: Caller,
    binary_in: bool,
    binary_out: bool | None,
    compression: str | None,
) -> None:
    images = digits(4)
    outputs = None
    if binary_out is not None:
        outputs = [triton.InferRequestedOutput(protocol.OUTPUT_NAME, binary_data=binary_out)]
    result = client.infer(
        protocol.MODEL_NAME,
        [make_input(images, binary=binary_in)],
        outputs=outputs,
        request_id="id-1",
        headers=caller.headers,
        request_compression_algorithm=compression,
    )
    np.testing.assert_allclose(result.as_numpy(protocol.OUTPUT_NAME), logits_of(caller.infer(images)), atol=1e-5)
    assert result.get_response()["id"] == "id-1"


def test_a_key_and_an_idempotency_key_travel_with_each_call(
    client: triton.InferenceServerClient, caller: Caller
) -> None:
    headers = caller.headers | {"Idempotency-Key": "once"}
    for _ in range(2):
        client.infer(protocol.MODEL_NAME, [make_input(digits(3))], headers=headers)
    assert caller.budget()["spent"] == 3


def test_a_refusal_is_its_exception(client: triton.InferenceServerClient, server: Running) -> None:
    with pytest.raises(InferenceServerException, match="API key"):
        client.infer(protocol.MODEL_NAME, [make_input(digits(3))])
    with pytest.raises(InferenceServerException, match="budget of 2"):
        client.infer(protocol.MODEL_NAME, [make_input(digits(3))], headers=server.caller(budget=2).headers)


def test_the_asyncio_client_gets_the_same(server: Running, caller: Caller) -> None:
    async def run() -> tuple[np.ndarray, str]:
        async with triton_aio.InferenceServerClient(server.address) as client:
            assert await client.is_server_ready()
            result = await client.infer(
                protocol.MODEL_NAME, [make_input(digits(4), module=triton_aio)], headers=caller.headers
            )
            with pytest.raises(InferenceServerException) as refusal:
                await client.infer(protocol.MODEL_NAME, [make_input(digits(4), module=triton_aio)])
            return result.as_numpy(protocol.OUTPUT_NAME), str(refusal.value)

    logits, refusal = asyncio.run(run())
    np.testing.assert_allclose(logits, logits_of(caller.infer(digits(4))), atol=1e-5)
    assert "API key" in refusal
