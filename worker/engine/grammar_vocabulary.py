"""A model's tokens as a grammar engine needs them, asked from the model's own guest: there is no second tokeniser."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Final

from guests.errors import GuestContractError, GuestError
from worker.engine.text import TextModel

#: The text that is forced by a grammar is tokenised in pieces; longer ones are not worth the guest's time.
MAX_FORCED_BYTES: Final = 4096


class GrammarVocabulary:
    """Bytes of every token, which ones are special, and how forced text is tokenised.

    Has the attributes that ``llguidance.LLTokenizer`` reads. ``text`` must be an instance of its own: it is called from
    the grammar threads, one at a time. O(V) guest calls, 0.12 s for 49,152 tokens.
    """

    is_tokenizer_wrapper: Final = True
    bos_token_id: Final = None

    def __init__(self, text: TextModel, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """
        Raises:
            GuestError: the guest failed.
        """
        self._text = text
        self._lock = threading.Lock()
        self.eos_token_id = eos_token_ids[0]
        self.tokens = [_bytes_of(text, token_id) for token_id in range(vocab_size)]
        num_known = max((i + 1 for i, token in enumerate(self.tokens) if token), default=0)
        self.special_token_ids = sorted({*_find_special(text, 0, num_known), *eos_token_ids})
        self._id_of: dict[bytes, int] = {}
        for token_id in range(num_known - 1, -1, -1):  # of equal tokens, the lowest id
            self._id_of[self.tokens[token_id]] = token_id
        for token_id in self.special_token_ids:
            self._id_of.pop(self.tokens[token_id], None)
        self._id_of.pop(b"", None)
        self._longest = max(map(len, self._id_of), default=1)

    def __call__(self, forced: str | bytes) -> list[int]:
        """Token ids of text that a grammar forces, as the model would write it; their bytes are exactly ``forced``.

        Where the guest's tokeniser changes the text (a prefix space, normalisation) or fails, the longest tokens that
        fit are taken from left to right.
        """
        data = forced.encode(errors="replace") if isinstance(forced, str) else forced
        if len(data) <= MAX_FORCED_BYTES:
            with self._lock:
                try:
                    text = data.decode()
                    token_ids = self._text.tokenize(text, add_special=False, parse_special=False)
                except (UnicodeDecodeError, GuestError):
                    token_ids = []
            if b"".join(self.tokens[token_id] for token_id in token_ids) == data:
                return token_ids
        return list(self._take_longest(data))

    def _take_longest(self, data: bytes) -> Iterator[int]:
        start = 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                token_id = self._id_of.get(data[start:end])
                if token_id is not None:
                    yield token_id
                    start = end
                    break
            else:
                return  # a byte without a token: nothing from here on can be forced


def _bytes_of(text: TextModel, token_id: int) -> bytes:
    """Empty for ids behind the tokeniser's last one: models round their vocabulary up."""
    try:
        return text.token_bytes(token_id)
    except GuestContractError:
        return b""


def _find_special(text: TextModel, start: int, end: int) -> Iterator[int]:
    """Ids in ``[start, end)`` that show only where special tokens are asked for; O(specials * log V) guest calls."""
    if start >= end:
        return
    token_ids = list(range(start, end))
    if text.detokenize(token_ids, show_special=True) == text.detokenize(token_ids):
        return
    if end - start == 1:
        yield start
        return
    middle = (start + end) // 2
    yield from _find_special(text, start, middle)
    yield from _find_special(text, middle, end)
