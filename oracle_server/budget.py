"""The rule of the budget: pure arithmetic on queries. One query is one row through the classifier."""

from __future__ import annotations

from dataclasses import dataclass

from shared.wire.errors import BudgetExhausted, ClientRevoked


@dataclass(frozen=True)
class Account:
    """What a client may spend in its lifetime and has spent so far, in queries."""

    client: str
    budget: int
    spent: int
    revoked: bool = False

    @property
    def remaining(self) -> int:
        """Queries left; zero where the budget was lowered below what had been spent."""
        return max(0, self.budget - self.spent)


def admit(account: Account, rows: int) -> None:
    """Say whether a batch of `rows` queries may be charged; it is admitted whole or not at all.

    Raises:
        ClientRevoked: the client's key was revoked.
        BudgetExhausted: more rows than remain; carries `requested`, `remaining` and `budget`.
    """
    if account.revoked:
        raise ClientRevoked(f"the key of client '{account.client}' was revoked: ask the operator for another")
    if rows > account.remaining:
        raise BudgetExhausted(
            f"the batch needs {rows} queries; {account.remaining} of the lifetime budget of {account.budget} are left, "
            "and nothing was charged: send a smaller batch or ask the operator for a larger budget",
            requested=rows,
            remaining=account.remaining,
            budget=account.budget,
        )
