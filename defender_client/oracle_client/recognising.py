"""Whether a server is one of ours, and who asks it if it is not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from defender_client.endpoint import JsonEndpoint, V2Endpoint
from defender_client.errors import ConfigError
from defender_client.oracle_client.connection import Connection
from defender_client.oracle_client.foreign_json import ForeignJson, server_of
from defender_client.oracle_client.foreign_v2 import ForeignV2
from defender_client.oracle_client.remote import RemoteOracle
from defender_client.oracle_client.retrying import Retrier
from shared.wire.errors import MethodNotAllowed, UnexpectedAnswer

_RETRY_SECONDS, _PATIENCE_SECONDS = 120.0, 3600.0


def keeps_a_ledger(url: str, api_key: str | None, ca: Path | None) -> bool:
    """Whether the server at an address keeps an account for its callers, as ours do. Costs no query.

    Raises:
        OracleError: it cannot be reached, or does not know the key.
    """
    with RemoteOracle(url, api_key, ca=ca) as asked:
        try:
            return asked.budget() is not None
        except (MethodNotAllowed, UnexpectedAnswer):
            return False


def asker(endpoint: V2Endpoint | JsonEndpoint, api_key: str | None, ca: Path | None) -> ForeignV2 | ForeignJson:
    """Who asks a foreign endpoint.

    Raises:
        ConfigError: a header's environment variable is not set.
        Unauthorized: a key that cannot be one.
    """
    secrets = _header_values(endpoint.header_env)
    url = server_of(endpoint.url) if isinstance(endpoint, JsonEndpoint) else endpoint.url
    connection = Connection(url, api_key, Retrier(_RETRY_SECONDS, _PATIENCE_SECONDS), ca=ca, secrets=secrets)
    return ForeignJson(endpoint, connection) if isinstance(endpoint, JsonEndpoint) else ForeignV2(endpoint, connection)


def _header_values(header_env: Mapping[str, str]) -> dict[str, str]:
    """Header values, read from where the description says they are, and kept nowhere."""
    missing = [variable for variable in header_env.values() if not os.environ.get(variable, "").strip()]
    if missing:
        raise ConfigError(f"header_env names environment variables that are not set: {', '.join(missing)}")
    return {header: os.environ[variable].strip() for header, variable in header_env.items()}
