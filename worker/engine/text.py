"""The text side of a model as the engine sees it; the guest runtime gives the real one."""

from __future__ import annotations

from typing import Protocol

# Defined beside the guest runtime, which is a leaf and cannot import from here.
from guests.push_result import PushResult as PushResult


class TextSequence(Protocol):
    """Incremental detokeniser and stop rules of one choice. Engine thread only."""

    def push(self, token_id: int) -> PushResult:
        """Feed a sampled token."""

    def flush(self) -> str:
        """Text still held back (incomplete characters become U+FFFD), for a choice that ends by length."""

    def close(self) -> None:
        """Free the guest's state. Idempotent."""


class Tokenizer(Protocol):
    """Tokeniser of one model, all of the text side that an encoder has. Engine thread only.

    May raise ``guests.errors.GuestTrap`` or ``GuestContractError``.
    """

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``."""


class TextModel(Tokenizer, Protocol):
    """Tokeniser and detokeniser of one model. Engine thread only.

    Every method may raise ``guests.errors.GuestTrap`` or ``GuestContractError``.
    """

    def detokenize(self, token_ids: list[int], *, show_special: bool = False) -> str:
        """Text of ``token_ids``; invalid UTF-8 becomes U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """Raw bytes of one token (for log-probabilities)."""

    def open_sequence(
        self, stop: tuple[str, ...], *, ignore_stop_tokens: bool = False, keep_leading_space: bool = False
    ) -> TextSequence:
        """State for one choice. ``keep_leading_space``: its text continues the prompt's, and is no text of its own."""
