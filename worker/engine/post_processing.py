"""A model's text with a post-processor behind it: finished lines are rewritten before anybody sees them.

The post-processor gets whole lines, with their line breaks, and at the end what is left: so it may look at a line as
one text, and a stream still flows line by line. Stop strings are found in the model's own text, before. What it raises
ends the one request.
"""

from __future__ import annotations

from typing import Final, Protocol

from guests.abi import SequenceEnd
from guests.errors import GuestError
from worker.engine.text import PushResult, TextModel, TextSequence

#: A line that is longer than this is handed over in parts: what is held back for a client is bounded.
MAX_HELD_CHARACTERS: Final = 65_536


class TextHook(Protocol):
    """What rewrites text; a restored Python guest. Engine thread only."""

    def post_process(self, text: str) -> str:
        """The text to send out for ``text``."""


class PostProcessingFailed(GuestError):
    """The post-processor trapped, took too long or answered too much. Not a :class:`GuestTrap`: the tokeniser's guest
    is well, so there is nothing to rebuild and to try again."""


class PostProcessedText:
    """A :class:`TextModel` whose sequences go through ``hook``; all else is the model's. Owns neither."""

    def __init__(self, text: TextModel, hook: TextHook) -> None:
        self.model_text: Final = text  # before anything is rewritten
        self._hook = hook

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """See :class:`TextModel`."""
        return self.model_text.tokenize(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, token_ids: list[int], *, show_special: bool = False) -> str:
        """See :class:`TextModel`; not post-processed."""
        return self.model_text.detokenize(token_ids, show_special=show_special)

    def token_bytes(self, token_id: int) -> bytes:
        """See :class:`TextModel`; not post-processed."""
        return self.model_text.token_bytes(token_id)

    def open_sequence(
        self, stop: tuple[str, ...], *, ignore_stop_tokens: bool = False, keep_leading_space: bool = False
    ) -> TextSequence:
        """State for one choice."""
        opened = self.model_text.open_sequence(
            stop, ignore_stop_tokens=ignore_stop_tokens, keep_leading_space=keep_leading_space
        )
        return _PostProcessedSequence(opened, self._hook)


def find_model_text(text: TextModel) -> TextModel:
    """What the model itself writes, with or without a post-processor behind it."""
    return text.model_text if isinstance(text, PostProcessedText) else text


class _PostProcessedSequence:
    def __init__(self, sequence: TextSequence, hook: TextHook) -> None:
        self._sequence = sequence
        self._hook = hook
        self._held = ""  # the line that is not finished

    def push(self, token_id: int) -> PushResult:
        pushed = self._sequence.push(token_id)
        self._held += pushed.text
        if pushed.end is SequenceEnd.STOP_STRING:
            return PushResult(self._release(len(self._held)), pushed.end)
        end = len(self._held) if len(self._held) > MAX_HELD_CHARACTERS else self._held.rfind("\n") + 1
        return PushResult(self._release(end), pushed.end)

    def flush(self) -> str:
        self._held += self._sequence.flush()
        return self._release(len(self._held))

    def close(self) -> None:
        self._sequence.close()

    def _release(self, end: int) -> str:
        """Rewrite the first ``end`` characters of what is held."""
        if end == 0:
            return ""
        text, self._held = self._held[:end], self._held[end:]
        try:
            return self._hook.post_process(text)
        except GuestError as error:
            raise PostProcessingFailed(f"its post-processor: {error}") from error
