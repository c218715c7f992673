"""The encoder side of a device backend: whole sequences in, a vector for each out, nothing kept between steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from guests.program import Program
from worker.backends.protocol import FloatArray, WeightTensor


class TokenSpan(NamedTuple):
    """Tokens ``first`` to ``first + num_tokens`` of a step are one sequence."""

    first: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class EncoderPlan:
    """All that a backend needs to bind an encoder. ``tensors[h]`` is the weight behind handle h of the program."""

    program: Program
    tensors: tuple[WeightTensor, ...]
    vocab_size: int
    context_length: int  # tokens
    vector_size: int  # width of the result


class BoundEncoder(Protocol):
    """An encoder bound to a device. Used by one thread, the engine's."""

    def encode(self, sequences: tuple[tuple[int, ...], ...]) -> FloatArray:
        """Vectors ``[S, vector_size]`` float32 of the sequences' token ids, each of at least one token. The array is
        valid until the next call."""

    def prepare_step(self, num_tokens: int) -> None:
        """Do ahead what the first step of ``num_tokens`` tokens would do first; may do nothing."""

    def statistics(self) -> Mapping[str, int]:
        """Counters, with units in their names."""

    def close(self) -> None:
        """Free device memory. Idempotent."""


def lay_out(sequences: tuple[tuple[int, ...], ...]) -> tuple[list[int], list[int], list[TokenSpan]]:
    """Token ids and positions of all sequences in a row, and where each of them lies."""
    token_ids: list[int] = []
    positions: list[int] = []
    spans: list[TokenSpan] = []
    for sequence in sequences:
        spans.append(TokenSpan(len(token_ids), len(sequence)))
        token_ids += sequence
        positions += range(len(sequence))
    return token_ids, positions, spans
