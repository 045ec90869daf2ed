from __future__ import annotations

import pytest

from oracle_server.budget import Account, admit
from shared.wire.errors import BudgetExhausted, ClientRevoked


def test_the_last_exact_fit_is_admitted() -> None:
    admit(Account("a", budget=10, spent=7), 3)


def test_one_row_more_is_refused_with_the_numbers() -> None:
    with pytest.raises(BudgetExhausted) as refusal:
        admit(Account("a", budget=10, spent=7), 4)
    assert refusal.value.extensions == {"requested": 4, "remaining": 3, "budget": 10}


def test_a_budget_lowered_below_what_was_spent_leaves_nothing() -> None:
    account = Account("a", budget=5, spent=7)
    assert account.remaining == 0
    with pytest.raises(BudgetExhausted):
        admit(account, 1)


def test_a_revoked_client_is_refused_whatever_is_left() -> None:
    with pytest.raises(ClientRevoked):
        admit(Account("a", budget=10, spent=0, revoked=True), 1)
