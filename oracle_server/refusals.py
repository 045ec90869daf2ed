"""What a request's state says once it is answered: who asked, and why it was refused."""

from __future__ import annotations

from typing import Final

from starlette.types import Scope

CALLER: Final = "caller"  # the client's name, once its key was found right
REFUSAL: Final = "refusal"  # the error's code


def refusal_of(scope: Scope) -> tuple[str, str] | None:
    """The client ('' where the key was not found right) and the code of a refusal; None where it was answered."""
    state = scope.get("state") or {}
    return (state.get(CALLER, ""), state[REFUSAL]) if REFUSAL in state else None
