"""What pushing one token into a sequence gives back."""

from __future__ import annotations

from dataclasses import dataclass

from guests.abi import SequenceEnd


@dataclass(frozen=True, slots=True)
class PushResult:
    """Text that one token released (may be empty) and whether the sequence ends with it.

    On STOP_TOKEN and STOP_STRING the stop itself is not part of ``text``.
    """

    text: str
    end: SequenceEnd
