"""What a policy file may hold, and what is said of one that holds something else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from oracle_server.policy import spec
from oracle_server.policy.spec import NoiseSpec, PolicyError, PolicySpec, load_policy

DOCS = Path(__file__).parents[2] / "docs" / "policy.md"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "policy.toml"


def documented() -> str:
    """The annotated example of the documentation."""
    (example,) = re.findall(r"```toml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    return str(example)


def test_nothing_and_an_empty_file_are_no_policy(file: Path) -> None:
    file.write_text("# nothing\n")
    assert load_policy(None) == load_policy(file) == PolicySpec()


def test_the_documented_example_is_read_and_shows_every_key(file: Path) -> None:
    file.write_text(documented())
    read = load_policy(file)
    assert read.answers.noise == NoiseSpec(sigma=0.05, kind="fresh")
    assert (read.answers.scores, read.answers.top_k, read.limits.announce_batch_rows) == ("probabilities", 3, False)
    assert [window.every for window in read.downtime] == [86400.0]
    table = tomllib.loads(documented())
    assert set(table) == set(PolicySpec.model_fields)
    for name, section in (
        ("answers", spec.AnswerSpec),
        ("latency", spec.LatencySpec),
        ("limits", spec.LimitSpec),
        ("failures", spec.FailureSpec),
    ):
        assert set(table[name]) == set(section.model_fields), name
    assert set(table["answers"]["noise"]) == set(NoiseSpec.model_fields)
    assert set(table["downtime"][0]) == set(spec.DowntimeSpec.model_fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decimals = 2", r"there is no key decimals: did you mean answers\.decimals\?"),
        ("[answers]\ndecimal = 2", r"there is no key answers\.decimal: did you mean answers\.decimals\?"),
        ("[answers]\nnoise = {sigma = 1, seed = 2}", "there is no key answers.noise.seed"),
        ("[speed]", "there is no key speed: did you mean seed"),
        ("[xyz]", "there is no key xyz in a policy"),
        ("[answers]\nscores = 'softmax'", "answers.scores = 'softmax': .*'probabilities'"),
        ("[answers]\ndecimals = '2'", "answers.decimals = '2': .*integer"),
        ("[answers]\ndecimals = 2.5", "answers.decimals = 2.5: .*integer"),
        ("[answers]\ndecimals = -1", "answers.decimals = -1"),
        ("[answers]\ndecimals = 10", "answers.decimals = 10"),
        ("[answers]\ntop_k = 0", "answers.top_k = 0"),
        ("[answers]\ntop_k = true", "answers.top_k = True"),
        ("[answers]\ntemperature = 0", "answers.temperature = 0"),
        ("[answers]\ntemperature = inf", "answers.temperature = inf"),
        ("[answers]\nnoise = {kind = 'fresh'}", "answers.noise.sigma is missing"),
        ("[answers]\nnoise = {sigma = inf}", "answers.noise.sigma = inf: .*finite"),
        ("[answers]\nnoise = {sigma = 0}", "answers.noise.sigma = 0"),
        ("[answers]\nnoise = {sigma = 1, kind = 'white'}", "answers.noise.kind = 'white'"),
        ("[answers]\nnoise = 0.5", r"answers.noise must be a table: write \[answers.noise\]"),
        ("[answers]\nscores = 'label'\ntop_k = 3", "answers: top_k cannot change"),
        ("[answers]\nscores = 'label'\ndecimals = 2\ntemperature = 2", "decimals and temperature cannot change"),
        ("[latency]\nmilliseconds = -1", "latency.milliseconds = -1"),
        ("[latency]\nmilliseconds = 1e9", "latency.milliseconds = 1000000000.0"),
        ("[latency]\ndistribution = 'normal'", "latency.distribution"),
        ("[limits]\nbatch_rows = 0", "limits.batch_rows = 0"),
        ("[limits]\nrows_per_minute = 0.5", "limits.rows_per_minute = 0.5"),
        ("[limits]\nrow_burst = 5", "limits: row_burst .* rows_per_minute"),
        ("[limits]\nrequest_burst = 5", "limits: request_burst .* requests_per_minute"),
        ("[limits]\ntell_limit = 1", "limits.tell_limit = 1"),
        ("[failures]\nunavailable = 1.5", "failures.unavailable = 1.5"),
        ("[failures]\ninternal = nan", "failures.internal = nan"),
        ("[[downtime]]\nafter = 3", "downtime.0.seconds is missing"),
        ("[[downtime]]\nafter = 3\nseconds = 0", "downtime.0.seconds = 0"),
        ("[[downtime]]\nafter = 3\nseconds = 2\nevery = 2", "downtime.0: every must be longer"),
        ("downtime = 3", r"downtime must be a table: write \[\[downtime\]\]"),
        ("seed = -1", "seed = -1"),
        ("seed = ", "not TOML"),
        ("seed = 1\nseed = 2", "not TOML"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_key(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(PolicyError, match=message) as caught:
        load_policy(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_told(file: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"policy\.toml cannot be read: No such file"):
        load_policy(file)
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(tmp_path)
    file.write_bytes(b"seed = 1 # \xff")
    with pytest.raises(PolicyError, match="UTF-8"):
        load_policy(file)


def test_a_policy_is_frozen_throughout() -> None:
    def sections(model: BaseModel) -> list[BaseModel]:
        found = [model]
        for name in type(model).model_fields:
            value = getattr(model, name)
            for each in value if isinstance(value, tuple) else [value]:
                found += sections(each) if isinstance(each, BaseModel) else []
        return found

    every = sections(PolicySpec.model_validate(tomllib.loads(documented())))
    assert len(every) == 7
    for section in every:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, next(iter(type(section).model_fields)), None)
