"""What travels for a query: the best form that the oracle takes, with the same answers and the same charge in each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from defender_support import PIXELS, certify_here, spent, tiny, train_here
from oracle_support import Caller, Running, running

from defender_client import config as configs
from defender_client import stack as stacks
from defender_client.black_box import BlackBox
from defender_client.config import ConfigError, Form
from defender_client.oracle_client import RemoteOracle
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.stack import Stack
from defender_client.zo import Estimator, make
from oracle_server.settings import Settings
from shared.wire import protocol
from shared.wire.errors import OracleError
from shared.wire.probes import Along, Coordinates, Difference, Probes, Seeds


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The digits classifier, open to decoders, with batches of at most 100 rows."""
    ledger = tmp_path_factory.mktemp("oracle") / "ledger.db"
    with running(Settings(ledger=str(ledger), allow_decoders=True, max_batch_rows=100)) as server:
        yield server


def a_stack(tmp_path: Path, *settings: str) -> Stack:
    torch.manual_seed(4)
    return Stack(stacks.specify(tiny(tmp_path, *settings), (1, 8, 8), 10)).eval()


def an_estimator(name: str = "cge") -> Estimator:
    return make(name, q=5, generator=torch.Generator().manual_seed(1))


def oracle_of(server: Running, caller: Caller, transport: httpx.BaseTransport | None = None) -> RemoteOracle:
    return RemoteOracle(server.url, caller.key, transport=transport, retry_seconds=5)


class Plain(httpx.HTTPTransport):
    """A server of the plain protocol: what ours says beyond it is taken out of its metadata."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if request.url.path != protocol.METADATA_ROUTE:
            return response
        response.read()
        document = response.json()
        return httpx.Response(200, json=document | {"parameters": self.told(document["parameters"])})

    def told(self, parameters: dict[str, Any]) -> dict[str, Any]:
        return {}


class Uniform(Plain):
    """A server of before there were ragged batches, which refuses an input that it does not know."""

    def told(self, parameters: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in parameters.items() if name != protocol.COUNTS_PARAMETER}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        assert b'"counts"' not in request.read()
        return super().handle_request(request)


@pytest.mark.parametrize("name", ["cge", "rge"])
@pytest.mark.parametrize("settings", [(), PIXELS], ids=["latent", "pixels"])
def test_every_form_has_the_same_answers_and_costs_the_same(
    merging: Running, tmp_path: Path, settings: tuple[str, ...], name: str
) -> None:
    """In latents 9 or 6 rows a point, several to a request; in pixels 65 or 6, one or several."""
    stack = a_stack(tmp_path, *settings)
    points = stack.front(torch.rand(25, 1, 8, 8, generator=torch.Generator().manual_seed(2))).detach()
    caller = merging.caller(100_000)
    found, sent = {}, {}
    for form in ("images", "auto"):
        with oracle_of(merging, caller) as oracle:
            box = BlackBox(stack, oracle, 64, form)
            before = spent(merging, caller)
            probed = box.probed(an_estimator(name).ask_factored(points), purpose="train", label="a")
            plain = box.logits(points, purpose="train", label="b")
            found[box.form] = torch.cat([probed.flatten(0, 1), plain])
            sent[box.form] = sum(request.bytes_up for request in oracle.log.requests.values())
            assert spent(merging, caller) - before == len(found[box.form])
            assert oracle.log.total == len(found[box.form])
    best = "factored" if settings else "merged"
    assert set(found) == {"images", best}
    torch.testing.assert_close(found[best], found["images"], rtol=0, atol=2e-5)
    assert sent[best] < sent["images"] / 3


def test_probes_of_one_point_that_are_too_many_for_a_request_are_cut(merging: Running, tmp_path: Path) -> None:
    stack, caller = a_stack(tmp_path, *PIXELS), merging.caller(100_000)
    points = torch.rand(2, 64, generator=torch.Generator().manual_seed(3))
    probes = make("cge", difference="central").ask_factored(points)
    assert probes.p == 128
    with oracle_of(merging, caller) as oracle:
        whole = BlackBox(stack, oracle, 1000, "factored").probed(probes, purpose="train", label="a")
        dense = BlackBox(stack, oracle, 1000, "images").probed(probes, purpose="train", label="b")
    torch.testing.assert_close(whole, dense, rtol=0, atol=2e-5)
    assert spent(merging, caller) == 2 * 256


def ragged(points: torch.Tensor, difference: Difference, *, counts: list[int], seeds: bool = False) -> Probes:
    """Probes of points [n, d] along up to 7 directions each."""
    n, d = points.shape
    rng = np.random.default_rng(8)
    axes = np.argsort(rng.random((n, d)), axis=1)[:, :7]
    along: Along = Seeds(np.arange(n, dtype=np.uint64)) if seeds else Coordinates(axes)
    return Probes(points.numpy(), np.full(7, 0.005, np.float32), along, difference, np.array(counts))


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("settings", [(), PIXELS], ids=["latent", "pixels"])
def test_ragged_probes_have_the_same_answers_and_cost_the_same_in_every_form(
    merging: Running, tmp_path: Path, settings: tuple[str, ...], difference: Difference
) -> None:
    """Of up to 15 rows a point, with at most 100 to a request where they are factored, and 50 where they are not."""
    stack = a_stack(tmp_path, *settings)
    points = stack.front(torch.rand(25, 1, 8, 8, generator=torch.Generator().manual_seed(2))).detach()
    counts = [0, 7, 3, 0, 1] * 4 + [7, 7, 0, 7, 0]
    caller = merging.caller(100_000)
    for seeds in (False, True):
        asked = ragged(points, difference, counts=counts, seeds=seeds)
        rows = sum(counts) + 25 if difference == "forward" else 2 * sum(counts)
        found = {}
        for transport, form in [(None, "auto"), (Uniform(), "auto"), (None, "images"), (Plain(), "auto")]:
            with oracle_of(merging, caller, transport) as oracle:
                box = BlackBox(stack, oracle, 50, form)
                assert oracle.info.counts is (transport is None)
                before = spent(merging, caller)
                logits = box.probed(asked, purpose="train", label="a")
                assert logits.shape == (rows, 10)
                assert spent(merging, caller) - before == oracle.log.total == rows
                found[type(transport).__name__, box.form] = logits
        best = "factored" if settings else "merged"
        assert set(found) == {("NoneType", best), ("Uniform", best), ("NoneType", "images"), ("Plain", "images")}
        whole = found["NoneType", best]
        assert torch.equal(found["Uniform", best], whole)
        for logits in found.values():
            torch.testing.assert_close(logits, whole, rtol=0, atol=2e-5)


def test_the_answers_to_ragged_probes_are_those_to_the_uniform_ones(merging: Running, tmp_path: Path) -> None:
    stack, caller = a_stack(tmp_path, *PIXELS), merging.caller(100_000)
    some = ragged(torch.rand(6, 64, generator=torch.Generator().manual_seed(3)), "central", counts=[2, 0, 7, 1, 0, 3])
    every = Probes(some.base, some.steps, some.along, some.difference)
    with oracle_of(merging, caller) as oracle:
        box = BlackBox(stack, oracle, 50)
        whole = box.probed(every, purpose="train", label="a")
        logits = box.probed(some, purpose="train", label="b")
    for i, (start, rows) in enumerate(zip(some.starts, some.row_counts, strict=True)):
        ahead, behind = logits[start : start + rows].chunk(2) if rows else (logits[:0], logits[:0])
        assert torch.equal(ahead, whole[i, : rows // 2])
        assert torch.equal(behind, whole[i, 7 : 7 + rows // 2])


@pytest.mark.parametrize("form", ["auto", "images"])
def test_probes_without_a_row_are_answered_unasked(merging: Running, tmp_path: Path, form: Form) -> None:
    stack, caller = a_stack(tmp_path, *PIXELS), merging.caller(100)
    with oracle_of(merging, caller) as oracle:
        asked = ragged(torch.rand(3, 64), "central", counts=[0, 0, 0])
        assert BlackBox(stack, oracle, 50, form).probed(asked, purpose="train", label="a").shape == (0, 10)
        assert not oracle.log.requests
    assert spent(merging, caller) == 0


def test_an_oracle_of_the_plain_protocol_is_asked_about_images(merging: Running, tmp_path: Path) -> None:
    caller = merging.caller(100_000)
    for settings in ((), PIXELS):
        stack = a_stack(tmp_path, *settings)
        with oracle_of(merging, caller, Plain()) as oracle:
            box = BlackBox(stack, oracle, 64)
            assert box.form == "images"
            points = stack.front(torch.rand(3, 1, 8, 8)).detach()
            logits = box.probed(an_estimator().ask_factored(points), purpose="train", label="a")
            assert logits.shape[0] == 3


@pytest.mark.parametrize(("form", "settings"), [("merged", PIXELS), ("factored", ()), ("factored", PIXELS)])
def test_a_form_that_cannot_be_had_is_said_so(
    merging: Running, tmp_path: Path, form: Form, settings: tuple[str, ...]
) -> None:
    transport = Plain() if (form, settings) == ("factored", PIXELS) else None
    with (
        oracle_of(merging, merging.caller(), transport) as oracle,
        pytest.raises(ConfigError, match=f"query_form={form}"),
    ):
        BlackBox(a_stack(tmp_path, *settings), oracle, 64, form)


def test_a_decoder_that_the_server_does_not_take_is_kept_here(tmp_path: Path) -> None:
    settings = Settings(ledger=str(tmp_path / "ledger.db"), allow_decoders=True, max_decoder_bytes=1000)
    with running(settings) as server, oracle_of(server, server.caller()) as oracle:
        assert oracle.info.decoders
        stack = a_stack(tmp_path)
        assert BlackBox(stack, oracle, 64).form == "images"
        assert not oracle.info.decoders
        with pytest.raises(ConfigError, match="query_form=merged"):
            BlackBox(stack, oracle, 64, "merged")


def test_a_decoder_that_the_server_forgot_is_registered_again(merging: Running, tmp_path: Path) -> None:
    caller, stack = merging.caller(), a_stack(tmp_path)
    points = stack.front(torch.rand(3, 1, 8, 8)).detach()
    with oracle_of(merging, caller) as oracle:
        box = BlackBox(stack, oracle, 64)
        first = box.logits(points, purpose="x", label="a")
        own = merging.service.decoders.of(caller.client.id)
        assert len(own) == 1
        merging.service.decoders.delete(caller.client.id, own[0].id)
        assert torch.equal(box.logits(points, purpose="x", label="b"), first)
        assert spent(merging, caller) == oracle.log.total == 6
    with oracle_of(merging, caller) as stranger:
        asked = BlackBox(stack, stranger, 64)
        merging.service.decoders.delete(caller.client.id, own[0].id)
        stranger._decoders.clear()
        with pytest.raises(OracleError, match="no decoder"):
            asked.logits(points, purpose="x", label="c")


@pytest.mark.parametrize("settings", [(), PIXELS], ids=["latent", "pixels"])
def test_a_run_in_the_best_form_learns_what_one_of_images_learns(
    merging: Running, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    weights, sent = {}, {}
    for form in ("images", "auto"):
        caller = merging.caller(100_000)
        # One step: later ones differ as far as rounding was carried on.
        one = ("train.epochs=1", "train.batch=96", f"train.query_form={form}")
        run = tmp_path / form
        stack = train_here(tiny(tmp_path, *settings, *one), run, merging.url, caller.key)
        weights[form] = torch.cat([tensor.flatten() for tensor in stack.state_dict().values()])
        log = QueryLog.read(run / LOG_FILE)
        assert log.total == spent(merging, caller)
        sent[form] = sum(request.bytes_up for request in log.requests.values() if request.purpose == "train")
    torch.testing.assert_close(weights["auto"], weights["images"], rtol=1e-3, atol=1e-3)
    assert sent["auto"] < sent["images"] / 3  # of 4 rows a point and more


def test_the_plan_counts_the_bytes_of_the_form(merging: Running, tmp_path: Path) -> None:
    from test_plan import planned

    with oracle_of(merging, merging.caller(100_000)) as oracle:
        best, images = (
            planned(tiny(tmp_path, f"train.query_form={form}", f"certify.query_form={form}"), oracle).bytes_up
            for form in ("auto", "images")
        )
    # 8 latents of 64 pixels; 9 probes of a point share it; 112 labels and the noise's queries are images.
    others = (112 + 186) * 64 * 4
    assert images - others == (2 * 96 * 9 + 2 * 16 + 4 * 110) * 64 * 4
    assert best - others == (2 * 96 + 2 * 16 + 4 * 110) * 8 * 4


def test_a_run_and_its_certificates_in_latents_can_be_had_again(merging: Running, tmp_path: Path) -> None:
    from test_replay import check_same, replay

    caller, config, run = merging.caller(100_000), tiny(tmp_path), tmp_path / "recorded"
    train_here(config, run, merging.url, caller.key, record=True)
    certify_here(config, run, merging.url, caller.key, record=True)
    bodies = [json.loads(line) for line in (run / LOG_FILE).read_text().splitlines()]
    assert max(line.get("up", 0) for line in bodies if "/certify/" in line.get("key", "")) < 100 * 8 * 4 + 1000
    again = tmp_path / "again"
    replay(config, again, run)
    check_same(again, run)
    assert configs.load(again) == config
    assert np.isfinite(spent(merging, caller))
