"""The benchmarks of bytes, growth and certification as commands, with little to do: what they print fits together."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import torch

from benchmarks import bytes as wire_bytes
from benchmarks import certification, growth
from benchmarks.bytes import Relay
from benchmarks.certification import Turn
from benchmarks.stacks import latent_stack


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints; its server is a process, as ever."""

    def call(command: Callable[[], None], *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        command()
        return capsys.readouterr().out

    return call


def rows(text: str) -> dict[str, list[list[str]]]:
    """Rows of all tables by their first cell."""
    found: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("| "):
            name, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(name, []).append(rest)
    return found


def number(cell: str) -> float:
    return float(cell.replace(",", "").rstrip("%"))


def test_a_relay_counts_every_byte_and_changes_none() -> None:
    seen: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.requestline.encode() + b"\r\n" + str(self.headers).replace("\n", "\r\n").encode())
            seen.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    answer = b"HTTP/1.0 200 OK\r\nX: y\r\n\r\n" + bytes(300_000)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.handle_request, daemon=True).start()
        relay = Relay(server.server_port)
        body = bytes(range(256)) * 1000
        with urllib.request.urlopen(relay.url, data=body, timeout=10) as response:
            assert response.read() == bytes(300_000)
        relay.close()
    head, received = seen
    assert received == body
    assert relay.up == len(head) + len(body)
    assert relay.down == len(answer)


def test_latents_of_a_random_stack_make_different_images() -> None:
    images = latent_stack(192).back(torch.rand(8, 192, generator=torch.Generator().manual_seed(0)))
    assert images.std(0).mean() > 0.05


def test_bytes_of_a_training_sample(run: Callable[..., str]) -> None:
    small = ("--model", "linear", "--engine", "eager", "--samples", "2", "--query-rows", "200")
    found = rows(run(wire_bytes.main, *small, "--only", "latent: CGE d=192, forward", "pixels: RGE q=20"))
    images, merged = (found[f"latent: CGE d=192, forward: {form}"][0] for form in ("images", "merged"))
    assert number(images[2]) == pytest.approx(193 * 3 * 32 * 32 * 4, rel=0.001)
    for queries, up, body_up, down, body_down, _ in (images, merged):
        assert queries == "193"
        # HTTP's own: a request line and some headers.
        assert 50 < number(up) - number(body_up) < 2000
        assert 50 < number(down) - number(body_down) < 2000
    assert number(merged[5]) == pytest.approx(number(images[1]) / number(merged[1]), abs=0.1)
    assert number(merged[5]) > 100
    # Of 21 images, one and a seed.
    assert number(found["pixels: RGE q=20, forward: factored"][0][5]) == pytest.approx(21, rel=0.1)


def test_bytes_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    case = wire_bytes._cases(1)[0]
    right = wire_bytes.Sent("images", 200_000, 10, 200_000, 10, 193, torch.ones(1, 192), 0)
    fewer = wire_bytes.Sent("merged", 1_000, 10, 900, 10, 193, torch.ones(1, 192), 0)
    assert wire_bytes._report({case: [right, fewer]}, {case: 1e-3}) == []
    wrong = wire_bytes.Sent("merged", 3_000, 10, 900, 10, 192, torch.full((1, 192), 1.1), 0)
    complaints = wire_bytes._report({case: [right, wrong]}, {case: 1e-3})
    expected = ("charged 192", "beyond rounding", "66.7 times")
    assert all(part in said for part, said in zip(expected, complaints, strict=True)), complaints
    capsys.readouterr()


def test_growth(run: Callable[..., str]) -> None:
    text = run(growth.main, "--model", "linear", "--engine", "eager", "--quick")
    found = rows(text)
    for size in ("1", "64", "16", "48", "96"):
        for rate, _, _, latency, _, server, client in found[size]:
            assert min(map(number, (rate, latency, server, client))) > 0
    assert len(found["1"]) == 3  # a row, a client, a direction
    assert text.count("413, 0 charged: the batch has 4097 rows and at most 4096 are taken at once") == 2


def test_certification(run: Callable[..., str]) -> None:
    small = (
        "--model",
        "linear",
        "--engine",
        "eager",
        "--n",
        "50",
        "--images",
        "2",
        "--rounds",
        "1",
        "--denoiser",
        "none",
    )
    found = rows(run(certification.main, *small, "--in-flight", "1", "2"))
    for form, least in (("merged", 150 * 192 * 4), ("images", 150 * 3 * 32 * 32 * 4)):
        for count in (1, 2):
            images, queries, *_, busy, _, sent = found[f"{form}, {count} in flight"][0]
            assert number(queries) == pytest.approx(150 * number(images), rel=0.01)
            assert 0 <= number(busy) <= 100
            assert least / 1e6 == pytest.approx(number(sent), rel=0.05)


def test_a_certification_is_compared_with_both_bounds() -> None:
    turns = {"oracle, in process": [Turn(300.0)]}
    for form in ("merged", "images"):
        turns |= {f"defender alone, {form}": [Turn(600.0)], f"{form}, 1 in flight": [Turn(100.0, 0.5, 0.002, 2e6)]}
    found = rows(certification.report(turns, [1], 400))["merged, 1 in flight"][0]
    # 1 / (1/300 + 1/600) = 200 and min(300, 600) = 300.
    assert found == ["0.2", "100", "100 to 100", "1.00", "50%", "33%", "50%", "2.0", "2.00"]
