"""Options that two commands of the command line share, written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., None])


def with_options_of(
    command: Callable[..., None], *, without: frozenset[str] = frozenset(), only: frozenset[str] | None = None
) -> Callable[[F], F]:
    """A decorator: the function takes another command's options, too, as its keywords `**given`.

    Args:
        command: whose options they are.
        without: names of those that are left out.
        only: names of those that are taken; None for all.
    """

    def decorate(function: F) -> F:
        own = [p for p in _parameters(function) if p.kind is not inspect.Parameter.VAR_KEYWORD]
        others = [p for p in _parameters(command) if p.name not in without and (only is None or p.name in only)]
        # What typer reads; each option is passed by its name.
        merged = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *others)])
        function.__signature__ = merged  # type: ignore[attr-defined]
        return function

    return decorate


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function, eval_str=True).parameters.values())
