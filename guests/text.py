"""The text side of a model, answered by its guest: tokeniser, detokeniser, stop rules.

Implements ``worker.engine.text.TextModel`` by structure (this package imports nothing of the worker's).
"""

from __future__ import annotations

import struct
from array import array
from typing import Final

from guests.abi import SequenceEnd, SequenceFlag, TokenizeFlag
from guests.errors import GuestContractError
from guests.push_result import PushResult
from guests.runtime import DEFAULT_LIMITS, GuestInstance, GuestModule, InstanceLimits

PUSH_RESULT: Final = struct.Struct("<III")  # text pointer, text bytes, finish
MAX_IDS_PER_BYTE: Final = 16  # compatibility decomposition makes up to 11 bytes of one, and special tokens come on top
SPARE_IDS: Final = 1_024
FAILED: Final = -1
FINISHES: Final = {end.value: end for end in SequenceEnd}
LOW_32: Final = 0xFFFF_FFFF


class GuestText:
    """One tokenising instance of a model's guest. Engine thread only; closed by its owner (the module is not).

    A trap or a broken contract closes the instance and raises; the next call works on a fresh one in the snapshotted
    state. Sequences that were open on the old one raise :class:`GuestTrap` from then on.
    """

    def __init__(self, module: GuestModule, seed: int, limits: InstanceLimits = DEFAULT_LIMITS) -> None:
        """Instantiates and resumes the guest, which never runs ``gp_init`` again.

        Raises:
            GuestTrap: ``gp_resume`` trapped.
            GuestContractError: it returned an error, or the guest does not fit into ``limits``.
        """
        self._module = module
        self._seed = _as_i64(seed)
        self._limits = limits
        self._closed = False
        self._instance = self._resume()

    def _resume(self) -> GuestInstance:
        instance = self._module.instantiate(self._limits)
        try:
            code = instance.call("gp_resume", self._seed)
            if code != 0:
                raise GuestContractError(f"gp_resume failed with code {code}")
        except BaseException:
            instance.close()
            raise
        return instance

    def _open_instance(self) -> GuestInstance:
        if self._closed:
            raise GuestContractError("the guest's text side is closed")
        if self._instance.is_closed:
            self._instance = self._resume()
        return self._instance

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text`` (lone surrogates become U+FFFD).

        Raises:
            GuestTrap: the guest trapped or took too long.
            GuestContractError: it has no tokeniser, no memory for the text, or broke the ABI.
        """
        flags = (TokenizeFlag.ADD_SPECIAL if add_special else 0) | (TokenizeFlag.PARSE_SPECIAL if parse_special else 0)
        instance = self._open_instance()
        data = _encode(text)
        packed = instance.call("gp_tokenize", _put(instance, data), len(data), flags)
        ids = array("I")
        max_ids = min(MAX_IDS_PER_BYTE * len(data) + SPARE_IDS, self._limits.result_bytes // 4)
        ids.frombytes(_take(instance, "gp_tokenize", packed, max_ids, item_bytes=4))
        return ids.tolist()

    def detokenize(self, token_ids: list[int], *, show_special: bool = False) -> str:
        """Text of ``token_ids``; invalid UTF-8 becomes U+FFFD.

        Raises:
            GuestTrap: see :meth:`tokenize`.
            GuestContractError: see :meth:`tokenize`; or an id is not one of the model's.
        """
        instance = self._open_instance()
        try:
            data = array("I", token_ids).tobytes()
        except OverflowError as error:
            raise GuestContractError("a token id is not an unsigned 32-bit number") from error
        flags = SequenceFlag.SHOW_SPECIAL if show_special else 0
        packed = instance.call("gp_detokenize", _put(instance, data), len(token_ids), flags)
        return _take(instance, "gp_detokenize", packed, self._limits.result_bytes).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Raw bytes of one token.

        Raises:
            GuestTrap: see :meth:`tokenize`.
            GuestContractError: see :meth:`detokenize`.
        """
        instance = self._open_instance()
        packed = instance.call("gp_token_bytes", token_id)
        return _take(instance, "gp_token_bytes", packed, self._limits.result_bytes)

    def open_sequence(
        self, stop: tuple[str, ...], *, ignore_stop_tokens: bool = False, keep_leading_space: bool = False
    ) -> GuestSequence:
        """State for one choice. ``keep_leading_space``: its text continues another one.

        Raises:
            GuestTrap: see :meth:`tokenize`.
            GuestContractError: see :meth:`tokenize`; or the guest has too many open sequences.
        """
        instance = self._open_instance()
        block = [struct.pack("<I", len(stop))]
        for text in stop:
            data = _encode(text)
            block += [struct.pack("<I", len(data)), data]
        encoded = b"".join(block)
        flags = SequenceFlag.IGNORE_STOP_TOKENS if ignore_stop_tokens else SequenceFlag(0)
        if keep_leading_space:
            flags |= SequenceFlag.KEEP_LEADING_SPACE
        handle = instance.call("gp_sequence_open", _put(instance, encoded), len(encoded), flags)
        if handle < 0:
            raise GuestContractError(f"gp_sequence_open failed with code {handle}")
        return GuestSequence(instance, handle, self._limits.result_bytes)

    def close(self) -> None:
        """Close the instance; the text and its sequences raise from then on. Idempotent."""
        self._closed = True
        self._instance.close()


class GuestSequence:
    """Incremental detokeniser and stop rules of one choice. Engine thread only; closed by its owner."""

    __slots__ = ("_handle", "_instance", "_max_bytes")

    def __init__(self, instance: GuestInstance, handle: int, max_bytes: int = DEFAULT_LIMITS.result_bytes) -> None:
        self._instance = instance
        self._max_bytes = max_bytes  # of text that one call releases
        self._handle: int | None = handle

    def push(self, token_id: int) -> PushResult:
        """Feed a sampled token.

        Raises:
            GuestTrap: the guest trapped, now or earlier, and the sequence's state is lost.
            GuestContractError: the guest broke the ABI, or the sequence is closed.
        """
        instance = self._instance
        packed = instance.call("gp_sequence_push", self._open_handle(), token_id)
        result = _take(instance, "gp_sequence_push", packed, PUSH_RESULT.size)
        if len(result) != PUSH_RESULT.size:
            raise _break_off(instance, f"gp_sequence_push: a result of {len(result)} bytes, not {PUSH_RESULT.size}")
        pointer, length, finish = PUSH_RESULT.unpack(result)
        if finish not in FINISHES:
            raise _break_off(instance, f"gp_sequence_push: unknown finish {finish}")
        if length > self._max_bytes:
            raise _break_off(instance, f"gp_sequence_push: a text of {length} bytes: at most {self._max_bytes}")
        text = _read(instance, pointer, length).decode(errors="replace") if length else ""
        return PushResult(text, FINISHES[finish])

    def flush(self) -> str:
        """Text still held back; incomplete characters become U+FFFD.

        Raises:
            GuestTrap: see :meth:`push`.
            GuestContractError: see :meth:`push`.
        """
        packed = self._instance.call("gp_sequence_flush", self._open_handle())
        return _take(self._instance, "gp_sequence_flush", packed, self._max_bytes).decode(errors="replace")

    def close(self) -> None:
        """Free the guest's state. Idempotent.

        Raises:
            GuestTrap: the guest trapped while freeing; its instance is closed.
        """
        handle, self._handle = self._handle, None
        if handle is not None and not self._instance.is_closed:
            self._instance.call("gp_sequence_close", handle)

    def _open_handle(self) -> int:
        if self._handle is None:
            raise GuestContractError("the sequence is closed")
        return self._handle


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # lone surrogates, as JSON may hold them
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _as_i64(seed: int) -> int:
    value = seed & 0xFFFF_FFFF_FFFF_FFFF
    return value - (1 << 64) if value >= 1 << 63 else value


def _put(instance: GuestInstance, data: bytes) -> int:
    """Copy ``data`` into the guest's input buffer; where it is."""
    pointer = instance.call("gp_buffer", max(1, len(data))) & LOW_32
    if pointer == 0:
        raise GuestContractError(f"the guest has no memory for {len(data)} bytes of input")
    try:
        instance.write(pointer, data)
    except GuestContractError:
        instance.close()  # see _break_off
        raise
    return pointer


def _take(instance: GuestInstance, name: str, packed: int, max_items: int, *, item_bytes: int = 1) -> bytes:
    """Copy of what a packed result points to: (pointer << 32 | number of items). A guest that lies about the number
    makes the host copy no more than ``max_items``."""
    if packed == FAILED:
        raise GuestContractError(f"{name} failed")
    if packed & LOW_32 > max_items:
        raise _break_off(instance, f"{name}: a result of {packed & LOW_32} items: at most {max_items}")
    return _read(instance, packed >> 32 & LOW_32, (packed & LOW_32) * item_bytes)


def _break_off(instance: GuestInstance, reason: str) -> GuestContractError:
    """The error to raise; the instance is closed, as a guest that breaks the ABI is not to be trusted with the next
    call."""
    instance.close()
    return GuestContractError(reason)


def _read(instance: GuestInstance, pointer: int, size: int) -> bytes:
    try:
        return instance.read(pointer, size)
    except GuestContractError:
        instance.close()  # see _break_off
        raise
