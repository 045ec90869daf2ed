from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle_support import digits

from oracle_server.engines import build_block_engine
from oracle_server.oracle import Oracle
from oracle_server.rows import DenseRows
from shared.wire.errors import MalformedRequest, UnacceptableValues


@pytest.fixture
def oracle() -> Oracle:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    return Oracle(build_block_engine(module, (1, 8, 8), most=4), (1, 8, 8), 3, block=4)


def test_blocks_make_no_difference(oracle: Oracle) -> None:
    images = digits(11)
    logits = oracle(DenseRows(images))
    assert logits.shape == (11, 3)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, np.concatenate([oracle(DenseRows(row[None])) for row in images]), atol=1e-6)


def test_views_of_read_only_unaligned_bytes_are_answered(oracle: Oracle) -> None:
    images = digits(2)
    view = np.frombuffer(b"x" + images.tobytes(), np.float32, offset=1).reshape(images.shape)
    np.testing.assert_array_equal(oracle(DenseRows(view)), oracle(DenseRows(images)))


@pytest.mark.parametrize(
    "images",
    [
        digits(2).astype(np.float64),
        digits(2)[0],
        np.zeros((2, 3, 8, 8), np.float32),
        np.zeros((0, 1, 8, 8), np.float32),
    ],
    ids=["dtype", "one image", "channels", "no row"],
)
def test_what_is_not_a_batch_is_malformed(oracle: Oracle, images: np.ndarray) -> None:
    with pytest.raises(MalformedRequest):
        oracle.check(images)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-6, 1.0 + 1e-6])
def test_one_bad_pixel_is_found(oracle: Oracle, value: float) -> None:
    images = digits(3)
    images[2, 0, 5, 7] = value
    with pytest.raises(UnacceptableValues) as refusal:
        oracle.check(images)
    assert refusal.value.extensions == {"index": [2, 0, 5, 7], "count": 1}


def test_the_ends_of_the_range_are_in_it(oracle: Oracle) -> None:
    images = digits(1)
    images[0, 0, 0, :2] = 0.0, 1.0
    oracle.check(images)
