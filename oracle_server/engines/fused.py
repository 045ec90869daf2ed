"""Frozen PyTorch: batch normalisations folded into the convolutions before them; on CUDA replayed as one graph.

torch.compile(freezing) was 1.1 times faster than this on 2 cores with ResNet-20, but took 24 s and a C++ compiler to
get there; TorchScript, frozen and optimised, was slower than this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from oracle_server.engines.candidate import NotACandidate, first_line
from oracle_server.engines.eager import EXACT, Arithmetic, channels_last, eager
from oracle_server.engines.engine import Compute


def fused(module: nn.Module, arithmetic: Arithmetic = EXACT) -> Compute:
    """The module with what is constant computed once.

    Raises:
        NotACandidate: its layers cannot be traced.
    """
    try:
        network: nn.Module = fuse(module)
    except Exception as error:  # tracing runs the module's own code: anything may come
        raise NotACandidate(f"torch.fx cannot trace it: {first_line(error)}") from error
    return _graphs(network, arithmetic) if arithmetic.device.type == "cuda" else eager(network, arithmetic)


def _graphs(network: nn.Module, arithmetic: Arithmetic) -> Compute:
    """CUDA graphs, one for each block size: a block costs one launch instead of one for each kernel."""
    network = network.to(arithmetic.device).to(memory_format=torch.channels_last)
    graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
    pool = torch.cuda.graph_pool_handle()  # shared: each answer is copied away before the next replay

    def capture(rows: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = channels_last(rows.to(arithmetic.device))
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose and allocate at first use, which a graph may not hold
            for _ in range(3):
                network(given)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            answers = network(given).float()
        return graph, given, answers

    def compute(rows: Tensor) -> Tensor:
        with torch.inference_mode(), torch.cuda.device(arithmetic.device), arithmetic():
            if rows.shape not in graphs:
                graphs[rows.shape] = capture(rows)
            graph, given, answers = graphs[rows.shape]
            given.copy_(rows)
            graph.replay()
            return answers.cpu().contiguous()

    return compute
