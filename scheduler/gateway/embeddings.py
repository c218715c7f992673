"""A call for embeddings: vectors are gathered and answered with one body.

Source of the body's shape: the openai-openapi specification, schema CreateEmbeddingResponse.
"""

from __future__ import annotations

import array
import base64
import sys

import msgspec
from aiohttp import web

from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import VectorFrame
from scheduler.gateway.collect import build_headers, wait_answer
from scheduler.gateway.exchange import Exchange, as_exception
from scheduler.gateway.exchange_part import Part

NUMBER_BYTES = 4  # of float32


class Embedding(msgspec.Struct):
    embedding: list[float] | str
    index: int
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


class EmbeddedCall:
    """One call for embeddings. Used once, by its handler."""

    def __init__(self, exchange: Exchange) -> None:
        embedding = exchange.call.embedding
        if embedding is None:
            raise ValueError("a call without inputs to embed")
        self._exchange = exchange
        self._vectors: list[bytearray | None] = [None] * len(embedding.inputs)

    async def run(self) -> web.Response:
        """Serve the call; the response is not sent yet.

        Raises:
            GlowplugError: refused, failed, or not finished within the configured limits.
        """
        trace = await wait_answer(self._exchange, on_vector=self._on_vector)
        return web.Response(body=self._build_body(), content_type="application/json", headers=build_headers(trace))

    def _on_vector(self, _part: Part, frame: VectorFrame) -> None:
        """Frames that come twice, because a second attempt made them again, fall on the same place."""
        vector = self._vectors[frame.index]
        if vector is None:
            vector = self._vectors[frame.index] = bytearray(frame.num_values * NUMBER_BYTES)
        begin = frame.offset * NUMBER_BYTES
        vector[begin : begin + len(frame.values)] = frame.values

    def _build_body(self) -> bytes:
        call = self._exchange.call
        data = []
        for index, vector in enumerate(self._vectors):
            if vector is None:
                raise as_exception(ErrorInfo(ErrorCode.INTERNAL, f"input {index} was answered without a vector"))
            encoded = base64.b64encode(vector).decode() if call.as_base64 else read_numbers(vector)
            data.append(Embedding(encoded, index))
        num_tokens = sum(part.terminal.usage.prompt_tokens for part in self._exchange.parts if part.terminal)
        return msgspec.json.encode(EmbeddingList(data, call.card.name, EmbeddingUsage(num_tokens, num_tokens)))


def read_numbers(vector: bytes | bytearray) -> list[float]:
    """The numbers of float32 little-endian bytes."""
    numbers = array.array("f")
    numbers.frombytes(vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
