"""The KV memory of a worker, in tokens: who holds how much of the budget. One owner, the engine's step loop."""

from __future__ import annotations

from typing import Final

#: Reservations grow in steps of this many tokens, so that a decode step seldom touches the budget.
BLOCK_TOKENS: Final = 64


class KvBudget:
    """Reservations of slots against a fixed number of bytes.

    Invariant: the reserved tokens never exceed :attr:`capacity_tokens`, and every holder has at least one block.
    """

    def __init__(self, budget_bytes: int, bytes_per_token: int) -> None:
        self._bytes_per_token = bytes_per_token
        self.capacity_tokens = budget_bytes // bytes_per_token // BLOCK_TOKENS * BLOCK_TOKENS
        self._reserved: dict[int, int] = {}
        self._reserved_tokens = 0

    @property
    def used_bytes(self) -> int:
        return self._reserved_tokens * self._bytes_per_token

    @property
    def free_tokens(self) -> int:
        return self.capacity_tokens - self._reserved_tokens

    def holders(self) -> frozenset[int]:
        """Slots that hold a reservation."""
        return frozenset(self._reserved)

    def tokens_of(self, slot: int) -> int:
        """Tokens reserved for ``slot``; 0 if none."""
        return self._reserved.get(slot, 0)

    def try_reserve(self, slot: int, num_tokens: int) -> bool:
        """Grow ``slot``'s reservation to hold ``num_tokens`` tokens; False, and no change, if the budget lacks them."""
        held = self._reserved.get(slot, 0)
        growth = round_to_blocks(num_tokens) - held
        if growth > self.free_tokens:
            return False
        if growth > 0:
            self._reserved[slot] = held + growth
            self._reserved_tokens += growth
        return True

    def release(self, slot: int) -> None:
        """Give ``slot``'s reservation back. Idempotent."""
        self._reserved_tokens -= self._reserved.pop(slot, 0)


def round_to_blocks(num_tokens: int) -> int:
    """``num_tokens`` rounded up to whole blocks."""
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
