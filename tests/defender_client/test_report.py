"""The report: its numbers against an independent count, its form, its pictures."""

from __future__ import annotations

import base64
import csv
import json
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from defender_support import PIXELS, Trained, tiny
from oracle_support import Running
from PIL import Image

from defender_client import config as configs
from defender_client import stack as stacks
from defender_client.certify import CERTIFIED_FILE, HEADER
from defender_client.config import ConfigError
from defender_client.noise_floor import NOISE_FILE
from defender_client.pretrain import fresh_stack
from defender_client.query_log import LOG_FILE
from defender_client.report import markdown_table, read_run, report
from defender_client.smoothing import largest_radius
from defender_client.train import CURVE_FILE, STACK_FILE
from shared.datasets import DatasetError

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that every element is closed in its order; keeps tables and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.pictures: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def written(target: Path, *runs: Path, data: Path | None = None) -> Page:
    report(runs, target, data)
    return Page(target.read_text(encoding="utf-8"))


def check_png(content: bytes) -> None:
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        kinds.append(kind)
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"


def percent(hits: int, of: int) -> str:
    return f"{100 * hits / of:.1f} %"


def test_the_numbers_are_those_of_the_files(trained: Trained, tmp_path: Path) -> None:
    page = written(tmp_path / "deep" / "report.html", trained.run)
    with (trained.run / CERTIFIED_FILE).open() as tsv:
        rows = list(csv.DictReader(tsv, delimiter="\t"))
    certified, account, noise = page.tables
    right = [float(row["radius"]) for row in rows if row["label"] == row["predict"]]
    assert certified[1] == [
        "run",
        "tiny",
        "0.25",
        "4",
        "100",
        "fixed",
        "110",
        percent(len(right), 4),
        percent(sum(radius >= 0.25 for radius in right), 4),
        "–",
        "–",
        percent(sum(row["predict"] == "-1" for row in rows), 4),
        f"{sum(right) / 4:.3f}",
    ]
    spent: dict[str, int] = {}
    purposes, bytes_up, bytes_down = {}, 0, 0
    for line in (trained.run / LOG_FILE).read_text().splitlines():
        entry = json.loads(line)
        if "purpose" in entry:
            purposes[entry["key"]] = entry["purpose"]
        else:
            spent[purposes[entry["key"]]] = spent.get(purposes[entry["key"]], 0) + entry["charged"]
            bytes_up, bytes_down = bytes_up + entry["up"], bytes_down + entry["down"]
    numbers = [f"{spent[purpose]:,}" for purpose in ("noise", "labels", "train", "validation", "certify")]
    numbers.append("0")  # attacks
    sizes = [f"{size / 1e6:,.1f} MB" for size in (bytes_up, bytes_down)]
    assert account[1] == ["run", *numbers, f"{sum(spent.values()):,}", *sizes]
    found = json.loads((trained.run / NOISE_FILE).read_text())["finding"]
    shown = [
        f"{found['noise']:.1e}",
        f"{found['slope']:.1e}",
        "0.005",
        "0.005",
        f"{100 * found['relative_error']:.1f} %",
    ]
    assert noise[1] == ["run", *shown]


def test_every_picture_is_in_the_page_and_beside_it(trained: Trained, tmp_path: Path) -> None:
    page = written(tmp_path / "report.html", trained.run)
    files = sorted(path.name for path in tmp_path.glob("*.png"))
    assert files == ["certified-accuracy.png", "images-run.png", "training.png"]
    inside = [base64.b64decode(picture.removeprefix("data:image/png;base64,")) for picture in page.pictures]
    assert sorted(inside) == sorted((tmp_path / name).read_bytes() for name in files)
    for content in inside:
        check_png(content)
    for name in files:
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image.convert("L")).std() > 5  # something is drawn
    # Nothing is fetched from elsewhere, and no path of this machine is given away.
    text = (tmp_path / "report.html").read_text()
    assert "http" not in text
    assert str(tmp_path) not in text
    assert str(trained.run.parent) not in text


def made_up(run: Path, rows: list[str], *settings: str, n: int = 100) -> Path:
    """A run whose certificates we wrote ourselves."""
    config = tiny(run.parent, f"certify.n={n}", *settings)
    configs.save(config, run)
    (run / CERTIFIED_FILE).write_text("\n".join([HEADER, *rows]) + "\n")
    return run


def test_the_table_by_hand(tmp_path: Path) -> None:
    rows = [
        "0\t3\t3\t0.600000\t1\t0:00:01",
        "1\t3\t3\t0.500000\t1\t0:00:01",
        "2\t3\t5\t0.700000\t0\t0:00:01",
        "3\t3\t-1\t0.000000\t0\t0:00:01",
        "4\t3\t3\t0.100000\t1\t0:00:01",
    ]
    run = made_up(tmp_path / "by-hand", rows, "sigma=0.5", n=100_000)
    page = written(tmp_path / "report.html", run)
    assert page.tables[0][1][7:] == ["60.0 %", "40.0 %", "40.0 %", "0.0 %", "20.0 %", "0.240"]
    table = markdown_table([read_run(run)]).splitlines()
    assert table[2] == "| by-hand | 60.0 | 40.0 | 40.0 | 0.0 | 20.0 | 0 | 0 |"
    assert {line.count("|") for line in table} == {9}


def test_a_radius_that_n_draws_cannot_reach_is_no_accuracy_of_zero(tmp_path: Path) -> None:
    row = ["0\t3\t3\t0.300000\t1\t0:00:01"]
    limit = largest_radius(100, 0.001, 0.25)
    assert 0.25 < limit < 0.5
    page = written(tmp_path / "report.html", made_up(tmp_path / "run", row))
    assert page.tables[0][1][7:11] == ["100.0 %", "100.0 %", "–", "–"]


def test_a_run_that_is_not_certified_has_dashes(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "new"
    shutil.copytree(trained.run, run, ignore=shutil.ignore_patterns("certif*"))
    page = written(tmp_path / "report.html", run)
    assert page.tables[0][1][3:] == ["0", "100", "fixed", *"–" * 7]
    assert page.tables[1][1][5] == "440"  # what was asked stays asked


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    configs.save(tiny(tmp_path), tmp_path / "run")
    page = written(tmp_path / "run" / "report.html", tmp_path / "run")
    assert page.tables[1][1] == ["run", "0", "0", "0", "0", "0", "0", "0", "0.0 MB", "0.0 MB"]
    assert len(page.pictures) == 1


def test_several_runs_are_shown_in_the_order_given(trained: Trained, tmp_path: Path) -> None:
    runs = [made_up(tmp_path / name, ["0\t3\t3\t0.3\t1\t0:00:01"]) for name in ("z", "a")] + [trained.run]
    page = written(tmp_path / "report.html", *runs)
    assert [row[0] for row in page.tables[0][1:]] == [row[0] for row in page.tables[1][1:]] == ["z", "a", "run"]
    shutil.copytree(trained.run, tmp_path / "again" / "run")
    with pytest.raises(ConfigError, match="share a name"):
        report([trained.run, tmp_path / "again" / "run"], tmp_path / "report.html", None)


def test_names_of_any_kind_are_shown_as_they_are(tmp_path: Path) -> None:
    name = "<b>&\"ü'"
    run = made_up(tmp_path / name, ["0\t3\t3\t0.3\t1\t0:00:01"], "description=<script>alert(1)</script>")
    page = written(tmp_path / "report.html", run)
    assert page.tables[0][1][0] == name
    assert "<script>" not in (tmp_path / "report.html").read_text()


def test_a_run_named_by_a_dot_has_its_name(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.run)
    assert written(tmp_path / "report.html", Path()).tables[0][1][0] == "run"


def test_a_validation_that_was_repeated_or_cut_off_by_a_kill_counts_once(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    lines = (run / CURVE_FILE).read_text().splitlines()
    (run / CURVE_FILE).write_text("\n".join([lines[0], lines[0], *lines[1:], '{"epo']))
    assert read_run(run).curve == [json.loads(line) for line in lines]


@pytest.fixture
def colour(tmp_path: Path) -> Path:
    """npz files of 12 colour images, 7 x 9."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        images = rng.integers(0, 256, (12, 7, 9, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.arange(12) % 3)
    return tmp_path


@pytest.mark.parametrize("settings", [(), PIXELS], ids=["latent", "pixels"])
def test_colour_images(colour: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    config = tiny(tmp_path, "data.dataset=npz", "data.validation_images=2", *settings)
    run = tmp_path / "colour"
    configs.save(config, run)
    stacks.save(fresh_stack(stacks.specify(config, (3, 7, 9), 3), 0), run / STACK_FILE)
    page = written(tmp_path / "report.html", run, data=colour)
    assert len(page.pictures) == 2
    with Image.open(tmp_path / "images-colour.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert int((pixels.max(axis=2) - pixels.min(axis=2)).max()) > 60
    with pytest.raises(DatasetError, match="--data"):
        report([run], tmp_path / "report.html", None)


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        report([tmp_path], tmp_path / "report.html", None)


def test_nothing_is_asked_or_left_behind(server: Running, trained: Trained, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.run.rglob("*")}
    paid = server.ledger.account(trained.caller.client.id).spent
    report([trained.run], tmp_path / "report.html", None)
    assert {path: path.stat().st_mtime_ns for path in trained.run.rglob("*")} == before
    assert server.ledger.account(trained.caller.client.id).spent == paid
