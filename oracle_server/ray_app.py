"""The oracle as an application of Ray Serve: replicas of one classifier, over one ledger.

    oracle-server ray --model digits-cnn --ledger postgresql://... --replicas 2
    serve run oracle_server.ray_app:build ledger=postgresql://... replicas=2

Each replica is a process that builds the whole server of `create_app` from the same settings. They meet only in the
ledger, which is where a charge is decided, so that it does not matter which of them answers.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oracle_server.ledger import Ledger
from oracle_server.replicas import Replicas, ReplicasError, read, shared_settings
from oracle_server.settings import Settings
from shared import process

if TYPE_CHECKING:
    from ray.serve import Application

    from oracle_server.replica import Replica

log = logging.getLogger(__name__)
NAME = "oracle"
# Bodies of more than 100 kB pass through it on their way from the proxy to a replica.
_OBJECT_STORE_BYTES = 512 * 2**20


class Oracle:
    """What Ray holds of a replica; `serve.ingress` adds `app`, which is ours."""

    app: Replica

    def __init__(self, log_level: str = "info") -> None:
        process.prepare()
        logging.basicConfig(
            stream=sys.stderr, level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )

    async def check_health(self) -> None:
        """For Ray, which replaces a replica that fails at this three times."""
        await self.app.check()


def build(given: Mapping[str, Any]) -> Application:
    """For `serve run`, `serve build` and `serve deploy`: arguments are fields of `Settings` and of `Replicas`.

    Raises:
        ReplicasError, LedgerError, PolicyError: they cannot be used.
    """
    settings, replicas = read(given)
    replicas.check(settings, one_machine=False)
    return application(settings, replicas)


def application(settings: Settings, replicas: Replicas) -> Application:
    """An application for `ray.serve.run`."""
    serve = require_serve()
    from oracle_server.replica import Replica

    ingress = serve.ingress(Replica(shared_settings(settings)))(Oracle)
    deployed = serve.deployment(**replicas.deployment(settings))(ingress)
    bound: Application = deployed.bind(settings.log_level)
    return bound


def run(settings: Settings, replicas: Replicas, *, address: str | None, announce: Callable[[str], None]) -> None:
    """Serve until a signal says to stop; `announce` is given the address once all replicas answer.

    Args:
        settings: of each replica; `host` and `port` are the proxy's.
        replicas: how many.
        address: of a running Ray cluster (`auto`, HOST:PORT, ray://...); None starts one on this machine, which ends
            with this.
        announce: told the address.

    Raises:
        ReplicasError: Ray is not installed, these replicas cannot be, the address is in use, or they did not start.
        LedgerError, PolicyError: as `Replicas.check` and `Ledger.open` do.
    """
    replicas.check(settings, one_machine=address is None)
    serve = require_serve()
    import ray

    given = shared_settings(settings)
    # Before anything is started: what is wrong with it is said here, in one line, and the key is made once.
    key = given["signing_key"] and Path(given["signing_key"])
    Ledger.open(given["ledger"], signing_key=key, timeout=settings.ledger_timeout).close()
    port = _free_port(settings.host, settings.port) if address is None else settings.port  # a machine of its own
    # The handlers after Ray's own, which it puts there when it starts.
    with _cluster(ray, address, replicas), _stopped_by_signal() as stopped:
        serve.start(http_options={"host": settings.host, "port": port})
        try:
            serve.run(application(settings, replicas), name=NAME, route_prefix="/")
            if not stopped.is_set():
                announce(f"http://{settings.host}:{port}")
            stopped.wait()
        except RuntimeError as error:
            raise ReplicasError(f"the replicas did not start: {error}; the log above says why") from error
        finally:
            serve.delete(NAME) if address else serve.shutdown()
    log.info("stopped")


def require_serve() -> Any:
    """The module `ray.serve`. Raises `ReplicasError` where Ray is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless somebody asks for it
    try:
        from ray import serve
    except ImportError as error:
        raise ReplicasError(f"replicas need Ray Serve ({error}): pip install 'zo-defense[ray]'") from None
    return serve


@contextmanager
def _cluster(ray: Any, address: str | None, replicas: Replicas) -> Iterator[None]:
    try:
        if address is not None:
            ray.init(address=address)
        else:
            if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # Ray would write one into the user's home
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray.init(include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES)
    except Exception as error:  # Ray has many, and nothing is running yet
        raise ReplicasError(f"Ray cannot be {'reached' if address else 'started'}: {error}") from error
    try:
        here = ray.cluster_resources()
        for name, each in (("CPU", replicas.num_cpus), ("GPU", replicas.num_gpus)):
            if address is None and each * replicas.most > here.get(name, 0):
                raise ReplicasError(
                    f"{replicas.most} replicas of {each:g} {name}s need more than the {here.get(name, 0):g} of this "
                    f"machine: give fewer replicas, or --num-{name.lower()}s less than {each:g}"
                )
        yield
    finally:
        ray.shutdown()


@contextmanager
def _stopped_by_signal() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets. A second one ends the process at once."""
    stopped = threading.Event()

    def stop(number: int, _frame: object) -> None:
        if stopped.is_set():
            sys.exit(128 + number)
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port(host: str, port: int) -> int:
    """The port, if it is free now, or one that is for 0: Ray wants to know it before it listens.

    Raises:
        ReplicasError: it is in use, or the address is not one of this machine's.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ReplicasError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
        free: int = probe.getsockname()[1]
        return free
