"""Vectors on their way into the token log, and back out of it when another attempt goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from scheduler.contract.messages import VectorFrame
from worker.engine.types import EncodedInput
from worker.publisher import Run

#: Of one frame's numbers, so that a message stays small for slow subscribers; a multiple of a number's 4 bytes.
CHUNK_BYTES: Final = 8 * 1024
NUMBER_BYTES: Final = 4


def split_vector(encoded: EncodedInput) -> Iterator[VectorFrame]:
    """The frames of one input's vector, in order."""
    for offset in range(0, len(encoded.vector), CHUNK_BYTES):
        yield VectorFrame(
            encoded.index,
            encoded.num_tokens,
            len(encoded.vector) // NUMBER_BYTES,
            offset // NUMBER_BYTES,
            encoded.vector[offset : offset + CHUNK_BYTES],
        )


def collect_encoded(run: Run) -> dict[int, int]:
    """Token counts of the inputs whose whole vectors earlier attempts logged. One that was cut short is encoded again.

    Raises:
        ContractError: the log holds something that is no frame.
    """
    return {
        frame.index: frame.num_tokens
        for frame in run.decode_frames()
        if isinstance(frame, VectorFrame) and frame.is_last
    }
