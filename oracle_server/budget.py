"""The rule of the budget: pure arithmetic on queries. One query is one row through the classifier."""

from __future__ import annotations

from dataclasses import dataclass

from shared.wire.errors import BudgetExhausted, ClientRevoked, Unavailable


class HeldByOthers(Unavailable):
    """What is left of the budget is held by the client's requests in flight: wait until they are paid or released."""


@dataclass(frozen=True)
class Account:
    """What a client may spend in its lifetime, has spent so far, and holds for requests in flight; in queries."""

    client: str
    budget: int
    spent: int
    held: int = 0
    revoked: bool = False

    @property
    def remaining(self) -> int:
        """Queries that a new request may take; zero where the budget was lowered below what had been spent."""
        return max(0, self.budget - self.spent - self.held)


def admit(account: Account, rows: int) -> None:
    """Say whether a batch of `rows` queries may be set aside; it is admitted whole or not at all.

    Raises:
        ClientRevoked: the client's key was revoked.
        BudgetExhausted: more rows than the budget leaves, whatever becomes of the requests in flight; carries
            `requested`, `remaining` and `budget`.
        HeldByOthers: it depends on what becomes of them.
    """
    if account.revoked:
        raise ClientRevoked(f"the key of client '{account.client}' was revoked: ask the operator for another")
    if rows > max(0, account.budget - account.spent):
        raise BudgetExhausted(
            f"the batch needs {rows} queries; {account.remaining} of the lifetime budget of {account.budget} are left, "
            "and nothing was charged: send a smaller batch or ask the operator for a larger budget",
            requested=rows,
            remaining=account.remaining,
            budget=account.budget,
        )
    if rows > account.remaining:
        raise HeldByOthers(
            f"the batch needs {rows} queries, and {account.held} of the {account.budget - account.spent} that are left "
            "are held by requests in flight: try again when they are done",
            retry_after=1,
        )
