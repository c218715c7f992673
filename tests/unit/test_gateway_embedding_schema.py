"""Bodies of POST /v1/embeddings: what is accepted, and which field every refusal names."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.contract import codec
from scheduler.contract.errors import GlowplugError
from scheduler.contract.messages import GenerateRequest, ModelCard, VectorFrame
from scheduler.contract.states import Task
from scheduler.gateway.embedding_schema import MAX_INPUTS, read_embedding_call, require_task

CARD = ModelCard("enc", task=Task.EMBED, vector_size=8, vocab_size=100, context_length=16)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("hi", ("hi",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], "b", [2, 3]], ((1,), "b", (2, 3)))],
)
def test_the_forms_of_input(given: Any, expected: tuple[Any, ...]) -> None:
    """A text, texts, token ids, and lists of token ids; the request survives the queue's encoding."""
    call = read_embedding_call({"model": "enc", "input": given, "dimensions": 4, "encoding_format": "base64"}, CARD)
    assert call.embedding is not None
    assert (call.embedding.inputs, call.embedding.dimensions, call.as_base64) == (expected, 4, True)
    request = GenerateRequest("r", "enc", "g", "", call.sampling, embedding=call.embedding)
    assert codec.decode(codec.encode(request), GenerateRequest) == request


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 3]}, "input[1]"),
        ({"input": [[1], []]}, "input[1]"),
        ({"input": [1, 100]}, "input"),
        ({"input": [1, True]}, "input"),
        ({"input": [1] * 17}, "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ({"input": "a", "dimensions": 9}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_refusals_name_their_field(fields: dict[str, Any], param: str) -> None:
    """Every wrong field is refused before a model wakes."""
    with pytest.raises(GlowplugError) as refused:
        read_embedding_call({"model": "enc", **fields}, CARD)
    assert refused.value.info.param == param


def test_models_are_asked_for_what_they_do() -> None:
    """Chat to an encoder, and embeddings of a chat model, name the endpoint to use."""
    with pytest.raises(GlowplugError, match="/v1/embeddings"):
        require_task(CARD, Task.GENERATE)
    with pytest.raises(GlowplugError, match="/v1/chat/completions"):
        read_embedding_call({"model": "llm", "input": "a"}, ModelCard("llm"))


def test_vector_frames_keep_their_bytes() -> None:
    """The token log gives back what was put in."""
    frame = VectorFrame(1, 5, 2, 0, b"12345678")
    assert codec.decode_frame(codec.encode_frame(frame)) == frame
    assert frame.is_last
