from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a server measures at start is measured once for all tests, and none of it comes from or goes to the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORACLE_ENGINE_CACHE", str(tmp_path_factory.mktemp("engines")))
        yield
