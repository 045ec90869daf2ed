"""The answer for an image has the same bits whatever it was asked with: in process, and over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_support import digits, logits_of, running
from torch import Tensor, nn
from torchvision.models import VisionTransformer, mobilenet_v3_small

from oracle_server.engines import BlockEngine, VaryingAnswers, build_block_engine, build_engine
from oracle_server.engines.blocks import cut
from oracle_server.engines.crew import Crew
from oracle_server.engines.ladder import climb
from oracle_server.loading import Classifier, load_classifier
from oracle_server.settings import Settings
from shared.models.classifiers import build_own

ENGINES = ("eager", "compile", "onnxruntime")


def classifier(name: str) -> Classifier:
    """A classifier with random weights, and batch normalisations whose folding changes something."""
    if name == "digits-cnn":
        return load_classifier(Settings())
    torch.manual_seed(0)
    if name == "mobilenet_v3_small":
        module: nn.Module | None = mobilenet_v3_small(num_classes=10)
    elif name == "vit":
        module = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10)
        nn.init.normal_(module.heads[-1].weight)  # torchvision starts it at zero, where all answers are alike
    else:
        module = build_own(name, 3, 10)
    assert module is not None
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.1, 0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return Classifier(module.eval().requires_grad_(False), (3, 32, 32), 10)


@pytest.fixture(scope="module", params=["digits-cnn", "small-cnn", "cifar-resnet20", "mobilenet_v3_small", "vit"])
def served(request: pytest.FixtureRequest) -> Classifier:
    return classifier(request.param)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, served: Classifier) -> BlockEngine:
    if request.param == "onnxruntime":
        pytest.importorskip("onnxruntime")
    built = build_engine(served, Settings(engine=request.param, engine_block=16))
    assert isinstance(built, BlockEngine)
    return built


@pytest.fixture
def busy() -> Iterator[None]:
    """Other threads that compute with torch, and with all its threads, meanwhile."""
    over = threading.Event()

    def work() -> None:
        matrix = torch.rand(256, 256)
        while not over.is_set():
            matrix @ matrix

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield
    over.set()
    for thread in threads:
        thread.join()


def check(engine: BlockEngine, shape: tuple[int, ...], trials: int) -> None:
    """Images asked alone, then at random places among random others in batches of random sizes."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((4, *shape), dtype=np.float32))
    alone = torch.cat([engine(image[None]) for image in images])
    for _ in range(trials):
        rows = int(rng.integers(4, 2 * engine.block + 8))
        places = rng.permutation(rows)[:4]
        batch = torch.from_numpy(rng.random((rows, *shape), dtype=np.float32))
        batch[places] = images
        answers = engine(batch)
        assert answers.shape == (rows, *engine.ladder.shape)
        assert torch.equal(answers[places].view(torch.int32), alone.view(torch.int32)), (rows, places)


def test_company_place_and_size_of_the_batch_do_not_matter(engine: BlockEngine, served: Classifier) -> None:
    check(engine, served.image_shape, 12)


def test_the_answers_are_the_classifiers(engine: BlockEngine, served: Classifier) -> None:
    images = torch.rand(7, *served.image_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = served.module(images)
    torch.testing.assert_close(engine(images), expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("name", ENGINES)
def test_busy_cores_do_not_matter(name: str) -> None:
    if name == "onnxruntime":
        pytest.importorskip("onnxruntime")
    served = classifier("small-cnn")
    built = build_engine(served, Settings(engine=name, engine_block=16))  # type: ignore[arg-type]
    assert isinstance(built, BlockEngine)
    check(built, served.image_shape, 8)


def test_neither_memory_order_nor_alignment_matters() -> None:
    served = classifier("small-cnn")
    engine = build_block_engine(served.module, served.image_shape, most=16)
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    answers = engine(images)
    memory = bytearray(images.numel() * 4 + 4)
    unaligned = torch.frombuffer(memory, dtype=torch.float32, offset=4).view_as(images).copy_(images)
    for other in (images.to(memory_format=torch.channels_last), unaligned, images.flip(0).flip(0)):
        assert torch.equal(engine(other), answers)


def test_a_decoder_is_invariant_too() -> None:
    torch.manual_seed(0)
    decoder = nn.Sequential(
        nn.Linear(12, 64), nn.ReLU(), nn.Unflatten(1, (4, 4, 4)), nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Sigmoid()
    ).eval()
    engine = build_block_engine(decoder, (12,), most=32)
    assert engine.ladder.shape == (3, 8, 8)
    check(engine, (12,), 12)


def test_over_http_concurrent_requests_do_not_matter(tmp_path: Path) -> None:
    images = digits(60, seed=5)
    with running(Settings(ledger=str(tmp_path / "ledger.db"))) as server, ThreadPoolExecutor(6) as pool:
        caller = server.caller(100_000)
        alone = np.concatenate([logits_of(caller.infer(image[None])) for image in images])

        def ask(seed: int) -> bool:
            rng = np.random.default_rng(seed)
            rows = rng.integers(0, len(images), int(rng.integers(1, 300)))
            return np.array_equal(logits_of(caller.infer(images[rows])).view(np.int32), alone[rows].view(np.int32))

        assert all(pool.map(ask, range(40)))


# What the ladder leaves out: answers are off by one unit in the last place where a kernel's might be.


def _off(rows: Tensor) -> Tensor:
    return torch.nextafter(rows, rows + 1)


def by_size(rows: Tensor) -> Tensor:
    return rows if len(rows) >= 4 else _off(rows)


def by_position(rows: Tensor) -> Tensor:
    return torch.cat([rows[:7], _off(rows[7:])])


def by_company(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)


def by_thread(rows: Tensor) -> Tensor:
    first = threading.current_thread().name.endswith("_0")
    return _off(rows) if first and len(rows) > 2 else rows


def by_chance(rows: Tensor) -> Tensor:
    return rows + torch.rand(1)


@pytest.fixture(scope="module")
def pair() -> Crew:
    return Crew(2)


@pytest.mark.parametrize(
    ("compute", "sizes"),
    [
        (lambda rows: rows + 1, {1, 2, 4, 8, 16}),
        (by_size, {4, 8, 16}),
        (by_position, {1, 2, 4}),
        (by_company, {1}),
        (by_thread, {1, 2}),
    ],
    ids=["none", "size", "position", "company", "thread"],
)
def test_sizes_that_answer_otherwise_are_not_used(compute, sizes: set[int], pair: Crew) -> None:  # type: ignore[no-untyped-def]
    def slow(rows: Tensor) -> Tensor:
        answers: Tensor = compute(rows)
        for _ in range(20):  # a cost of its own for each block, so that larger blocks pay
            torch.rand(1000).sort()
        return answers

    ladder = climb(slow, (3,), pair, 16, 60.0)
    assert set(ladder.sizes) == sizes
    engine = BlockEngine("odd", slow, ladder, pair)
    check(engine, (3,), 5)


@pytest.mark.parametrize(
    ("compute", "anchor", "sizes"), [(by_size, 2, {1, 2}), (by_size, 8, {4, 8}), (by_thread, 2, {1, 2})]
)
def test_an_anchor_decides_by_its_answers_and_not_by_the_clock(
    compute: Callable[[Tensor], Tensor], anchor: int, sizes: set[int], pair: Crew
) -> None:
    in_haste = climb(compute, (3,), pair, anchor, 0.0, anchor)
    # Of those that answer as the anchor does, how many are used is the clock's to say.
    assert in_haste.sizes
    assert set(in_haste.sizes) <= sizes
    alone = climb(by_position, (3,), pair, 16, 60.0, 16)  # it is not steady: as without it
    assert set(alone.sizes) <= {1, 2, 4}


def test_what_answers_by_chance_is_refused(pair: Crew) -> None:
    with pytest.raises(VaryingAnswers):
        climb(by_chance, (3,), pair, 16, 1.0)


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8, 16, 32), (4, 8), (32,), (2, 32)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_pieces_cover_each_row_once_in_blocks_of_the_ladder(sizes: tuple[int, ...], threads: int) -> None:
    for rows in range(1, 200):
        pieces = list(cut(rows, sizes, threads))
        assert [row for start, many, _ in pieces for row in range(start, start + many)] == list(range(rows))
        assert all(1 <= many <= size and size in sizes for _, many, size in pieces)


def test_one_row_costs_one_row_and_shares_are_even() -> None:
    sizes = (1, 2, 4, 8, 16, 32)
    assert list(cut(1, sizes, 2)) == [(0, 1, 1)]
    assert list(cut(32, sizes, 2)) == [(0, 16, 16), (16, 16, 16)]
    assert [size for _, _, size in cut(128, sizes, 2)] == [32] * 4
