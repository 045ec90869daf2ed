"""One tiny network, as every kind of file that a server can be given; and a hub on this machine."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from torch import Tensor, nn

SHAPE = (3, 12, 12)
CLASSES = 5
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Tiny(nn.Module):
    """Images [n, 3, 12, 12] -> logits [n, 5]; which channel and which row is which matters to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Linear(6 * 36, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.norm(self.first(images)).relu().flatten(1))


class Probabilities(nn.Module):
    """The same network's probabilities."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).softmax(1)


class ChannelsLastInput(nn.Module):
    """The same network for images [n, h, w, c]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.permute(0, 3, 1, 2))


def tiny() -> Tiny:
    torch.manual_seed(0)
    network = Tiny()
    nn.init.uniform_(network.norm.running_mean, -0.2, 0.2)
    nn.init.uniform_(network.norm.running_var, 0.5, 1.5)
    return network.eval().requires_grad_(False)


def write_onnx(network: nn.Module, path: Path, rows: int | None = None, shape: tuple[int, ...] = SHAPE) -> Path:
    """`rows`: the batch size it is exported for; by default any."""
    axes = None if rows else {"x": {0: "n"}, "y": {0: "n"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.zeros(rows or 2, *shape),), str(path), dynamo=False, input_names=["x"], output_names=["y"],
            dynamic_axes=axes, verbose=False,
        )  # fmt: skip
    return path


def write_export(network: nn.Module, path: Path, rows: int | None = None, shape: tuple[int, ...] = SHAPE) -> Path:
    """`rows` as of `write_onnx`."""
    free = None if rows else ({0: torch.export.Dim("n", min=1, max=8)},)
    program = torch.export.export(network, (torch.zeros(rows or 2, *shape),), dynamic_shapes=free)
    torch.export.save(program, path)
    return path


def write_script(network: nn.Module, path: Path, kind: str = "traced", shape: tuple[int, ...] = SHAPE) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(network) if kind == "scripted" else torch.jit.trace(network, torch.zeros(2, *shape))
        torch.jit.save(torch.jit.freeze(script) if kind == "frozen" else script, path)
    return path


@dataclass
class Hub:
    """A hub on a loopback port: `files` by OWNER/REPO and name, all of one commit; `asked` is what was requested."""

    url: str
    files: dict[tuple[str, str], bytes]
    asked: list[str] = field(default_factory=list)


@contextmanager
def hub(repositories: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve folders as repositories, as far as downloading a file goes."""
    files = {(repo, path.name): path.read_bytes() for repo, folder in repositories.items() for path in folder.iterdir()}
    found: list[Hub] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            found[0].asked.append(f"{self.command} {self.path}")
            repository, _, file = self.path.strip("/").partition("/resolve/")
            content = files.get((repository, file.rpartition("/")[2]))
            if content is None:
                known = any(name == repository for name, _ in files)
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            else:
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        do_GET = do_HEAD

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        found.append(Hub(f"http://127.0.0.1:{server.server_port}", files))
        yield found[0]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
