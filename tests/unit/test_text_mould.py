"""Chunks from a mould are byte for byte those that are encoded whole."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.gateway import sse
from scheduler.gateway.responses import ChatChunk, ChatChunkChoice, Delta
from scheduler.gateway.text_mould import TextMould


def make_chunk(text: str) -> ChatChunk:
    return ChatChunk("chatcmpl-1", 7, 'a "model"', "fp_1", [ChatChunkChoice(3, Delta(content=text))], None)


@given(st.text())
def test_a_moulded_event_is_the_encoded_one(text: str) -> None:
    """Quotes, line breaks, control characters and any script: the same bytes."""
    assert TextMould(make_chunk).event(text, b"r:12") == sse.event(msgspec.json.encode(make_chunk(text)), b"r:12")


def test_a_chunk_without_its_text_makes_no_mould() -> None:
    """What would lose the text is refused at once."""
    with pytest.raises(ValueError, match="0 times"):
        TextMould(lambda text: make_chunk("always the same"))
