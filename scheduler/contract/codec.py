"""MessagePack encoding of the contract's structs, with size caps checked before parsing. Never pickle."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from scheduler.contract.errors import ContractError
from scheduler.contract.messages import StepFrame, TerminalFrame, VectorFrame

T = TypeVar("T")

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
STEP_KIND: Final = b"t"
VECTOR_KIND: Final = b"v"
TERMINAL_KIND: Final = b"f"

Frame = StepFrame | VectorFrame | TerminalFrame

_KINDS: Final = {StepFrame: STEP_KIND, VectorFrame: VECTOR_KIND, TerminalFrame: TERMINAL_KIND}
_encoder: Final = msgspec.msgpack.Encoder()
_step_decoder: Final = msgspec.msgpack.Decoder(StepFrame)
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def encode(message: object) -> bytes:
    """MessagePack bytes of a contract struct."""
    return _encoder.encode(message)


def decode(data: bytes, kind: type[T] | Any) -> T:
    """The struct of type ``kind`` in ``data``.

    Raises:
        ContractError: larger than :data:`MAX_MESSAGE_BYTES`, or not a valid ``kind``.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise ContractError(f"message of {len(data)} bytes: at most {MAX_MESSAGE_BYTES} are accepted")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        result: T = decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ContractError(f"not a {kind}: {error}") from error
    return result


def encode_frame(frame: Frame) -> bytes:
    """A token-log element: kind byte, then MessagePack."""
    return _KINDS[type(frame)] + _encoder.encode(frame)


def decode_frame(data: bytes) -> Frame:
    """The frame in a token-log element.

    Raises:
        ContractError: unknown kind, too large, or malformed.
    """
    if data[:1] == STEP_KIND and len(data) <= MAX_MESSAGE_BYTES:  # once a token: no detour
        try:
            return _step_decoder.decode(memoryview(data)[1:])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ContractError(f"not a step frame: {error}") from error
    if data[:1] == TERMINAL_KIND:
        return decode(data[1:], TerminalFrame)
    if data[:1] == VECTOR_KIND:
        return decode(data[1:], VectorFrame)
    raise ContractError(f"unknown frame kind {data[:1]!r}")


def is_terminal(data: bytes) -> bool:
    """Whether a token-log element is a terminal frame (no parsing)."""
    return data[:1] == TERMINAL_KIND
