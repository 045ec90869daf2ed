"""Decoders that several servers of one ledger share, over either database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from databases import BACKENDS, ledger_url
from oracle_support import Caller, logits_of, running
from sqlalchemy import text

from oracle_server.decoder_store import DecoderStore
from oracle_server.decoders import Decoders
from oracle_server.ledger import Ledger
from oracle_server.settings import Settings
from shared.models.decoder import DecoderSpec, write
from shared.models.layers import Activation, Linear, Unflatten
from shared.wire import codec, protocol
from shared.wire.errors import DecoderUnknown, Unavailable

SHAPE = (1, 8, 8)


def content(seed: int = 0) -> bytes:
    """A decoder of four latents."""
    layers = (Linear(features_in=4, features_out=64), Activation(kind="sigmoid"), Unflatten(shape=SHAPE))
    spec = DecoderSpec(latent=4, image_shape=SHAPE, layers=layers)
    generator = torch.Generator().manual_seed(seed)
    return write(spec, {name: torch.randn(shape, generator=generator) for name, shape in spec.tensors().items()})


@pytest.fixture(params=BACKENDS)
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    made = Settings(
        ledger=ledger_url(tmp_path, request.param),
        signing_key=tmp_path / "signing.key",
        allow_decoders=True,
        share_decoders=True,
        max_client_decoders=3,
    )
    Ledger.open(made.ledger, signing_key=made.signing_key).close()
    return made


class Servers:
    """The decoders of two servers."""

    def __init__(self, settings: Settings) -> None:
        self.store = DecoderStore(settings)
        self.one, self.two = (Decoders(settings, SHAPE, self.store) for _ in range(2))


@pytest.fixture
def servers(settings: Settings) -> Iterator[Servers]:
    made = Servers(settings)
    yield made
    made.store.close()


def test_what_one_server_was_given_every_server_knows(servers: Servers) -> None:
    registered, new = servers.one.register(1, content())
    assert new
    latents = np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)
    found = servers.two.get(1, registered.id)
    assert found is not registered
    assert np.array_equal(found(latents), registered(latents))  # to the bit
    assert servers.two.get(1, registered.id) is found
    assert [decoder.id for decoder in servers.two.of(1)] == [registered.id]
    with pytest.raises(DecoderUnknown):
        servers.two.get(2, registered.id)  # another client's
    assert not servers.two.register(1, content())[1]


def test_what_was_deleted_is_found_nowhere_else(servers: Servers) -> None:
    name = servers.one.register(1, content())[0].id
    servers.two.delete(1, name)
    with pytest.raises(DecoderUnknown):
        servers.two.get(1, name)
    assert servers.one.of(1) == []
    with pytest.raises(DecoderUnknown):
        servers.two.delete(1, name)


def test_the_least_recently_used_go_first(servers: Servers) -> None:
    other = servers.one.register(2, content())[0].id
    names = [servers.one.register(1, content(seed))[0].id for seed in range(3)]
    servers.two.get(1, names[0])
    fourth = servers.one.register(1, content(3))[0].id
    assert servers.store.names(1) == [names[2], names[0], fourth]
    assert servers.store.names(2) == [other]


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"max_decoders": 2}, [[], ["new"], ["new"]]),
        ({"max_decoders_bytes": 2 * 1280}, [[], ["new"], ["new"]]),
        ({"max_decoders_bytes": 1}, [[], [], ["new"]]),  # one always finds room
    ],
)
def test_all_clients_together_keep_so_many(settings: Settings, limits: dict[str, int], kept: list[list[str]]) -> None:
    store = DecoderStore(settings.model_copy(update=limits))
    for client in (1, 2, 3):
        store.keep(client, "new", b"file", 1280)
    assert [store.names(client) for client in (1, 2, 3)] == kept
    store.close()


def test_a_database_that_fails_is_told(settings: Settings) -> None:
    ledger = Ledger.open(settings.ledger, signing_key=settings.signing_key)
    with ledger._writing.begin() as connection:
        connection.execute(text("DROP TABLE decoders"))
    ledger.close()
    decoders = Decoders(settings, SHAPE, DecoderStore(settings))
    with pytest.raises(Unavailable):
        decoders.register(1, content())
    with pytest.raises(Unavailable):
        decoders.get(1, "0" * 32)
    decoders.close()


def test_over_http_a_query_reaches_another_server_than_the_registration(settings: Settings) -> None:
    with running(settings) as one, running(settings) as two:
        caller = one.caller()
        name = one.http.post(protocol.DECODERS_ROUTE, content=content(), headers=caller.headers).json()["decoder"]
        latents = np.zeros((2, 4), np.float32)
        encoded = codec.encode_request({"latents": latents}, binary=True, parameters={"decoder": name})
        answers = [Caller(caller.client, caller.key, server.http).post(encoded) for server in (one, two)]
        assert np.array_equal(*map(logits_of, answers))
        for server in (two, one):
            listed = server.http.get(protocol.DECODERS_ROUTE, headers=caller.headers).json()
            assert [decoder["decoder"] for decoder in listed["decoders"]] == [name]
        assert two.http.delete(f"{protocol.DECODERS_ROUTE}/{name}", headers=caller.headers).status_code == 204
        assert one.http.get(protocol.DECODERS_ROUTE, headers=caller.headers).json()["decoders"] == []
        assert one.ledger.verify().intact
