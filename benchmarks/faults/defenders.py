"""A real defender as a process: `RemoteOracle` with its query log in a run directory; it may be killed any time."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np

from benchmarks.faults.work import ANSWERS_FILE, Job
from defender_client.oracle_client import OracleUnreachable, RemoteOracle
from defender_client.query_log import LOG_FILE, QueryLog
from defender_client.run_directory import locked
from shared.wire.errors import BudgetExhausted, InternalError, RateLimited, RequestInFlight, Unavailable

_PROGRESS_FILE = "progress"
_AGAIN = 2  # steps that are asked again after a start, though they were answered: replays
_PASSING = (OracleUnreachable, Unavailable, RequestInFlight, RateLimited, InternalError)


def defend(job: Job) -> None:
    """Work until told to finish; what the budget does not cover is asked again, for the budget may be raised."""
    with (
        locked(job.run) as run_id,
        RemoteOracle(
            job.url, job.api_key, log=QueryLog(job.run / LOG_FILE), run_id=run_id, retry_seconds=job.retry_seconds
        ) as oracle,
    ):
        answers = os.open(job.run / ANSWERS_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        step = max(0, _progress(job.run) - _AGAIN)
        while True:
            asked_last = job.finish.exists()
            answer = _ask(oracle, job, step)
            if answer is not None:
                # One write: a kill leaves all of it or nothing.
                os.write(answers, (json.dumps({"step": step, "answer": answer}) + "\n").encode())
            if answer is not None or not job.persistent:
                step += 1
                _note_progress(job.run, step)
            if asked_last:
                os.close(answers)
                return
            time.sleep(job.pause)


def _ask(oracle: RemoteOracle, job: Job, step: int) -> str | None:
    """The answer's digest; None where there was none."""
    rng = np.random.default_rng((job.seed, step))
    images = rng.random((int(rng.integers(1, job.most_rows + 1)), 1, 8, 8), dtype=np.float32)
    while True:
        try:
            logits = oracle.query(images, purpose="train", label=f"step-{step}")
            return hashlib.sha256(logits.tobytes()).hexdigest()
        except BudgetExhausted:
            time.sleep(0.2)
            return None
        except _PASSING:
            if not job.persistent:
                return None


def _progress(run: Path) -> int:
    path = run / _PROGRESS_FILE
    return int(path.read_text()) if path.exists() else 0


def _note_progress(run: Path, step: int) -> None:
    temporary = run / f"{_PROGRESS_FILE}.new"
    temporary.write_text(str(step))
    os.replace(temporary, run / _PROGRESS_FILE)
