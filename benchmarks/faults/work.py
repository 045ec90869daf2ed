"""What the clients' processes are told to do. Loads nothing heavy: the processes themselves have it loaded already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ANSWERS_FILE = "answers.jsonl"  # in a run directory: the digest of each step's answer


@dataclass(frozen=True)
class Job:
    """What a defender does: batch after batch, the same ones whenever it is started again.

    Attributes:
        retry_seconds: how long it tries one request.
        persistent: asks again for as long as it takes; else it gives a request up after `retry_seconds` and goes on.
        pause: seconds between requests.
        finish: the file whose presence ends it, after the step it is in.
    """

    url: str
    api_key: str
    run: Path
    seed: int
    most_rows: int
    retry_seconds: float
    persistent: bool
    pause: float
    finish: Path


def defend(job: Job) -> None:
    """The work of a defender's process, see `defenders`."""
    from benchmarks.faults import defenders

    defenders.defend(job)


def audit(url: str, clients: dict[str, tuple[str, list[Path]]]) -> list[str]:
    """`defender-client audit` of each client, whose API key and run directories are given; the differences found."""
    from defender_client.audit import audit as compare
    from defender_client.oracle_client import RemoteOracle

    found = []
    for client, (api_key, runs) in clients.items():
        with RemoteOracle(url, api_key, retry_seconds=30) as oracle:
            found += [f"{client}: {difference}" for difference in compare(runs, oracle).differences]
    return found
