"""How a model is computed: images in, answers out. Every engine gives the same answers, some sooner."""

from oracle_server.engines.blocks import BlockEngine
from oracle_server.engines.build import build_engine
from oracle_server.engines.engine import Engine
from oracle_server.engines.ladder import VaryingAnswers
from oracle_server.engines.modules import build_block_engine

__all__ = ["BlockEngine", "Engine", "VaryingAnswers", "build_block_engine", "build_engine"]
