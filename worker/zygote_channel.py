"""Framing of the zygote's socket: 4 bytes of length, 1 byte count of file descriptors, then MessagePack.

File descriptors travel as SCM_RIGHTS with the first byte of their message. A stream socket never merges the data of
two sends across ancillary data, so they arrive in the order of the messages that own them.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, Generic, TypeVar

from scheduler.contract.codec import decode, encode
from scheduler.contract.errors import ContractError

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
MAX_FDS_PER_READ: Final = 64
READ_BYTES: Final = 256 * 1024

_HEADER: Final = struct.Struct("<IB")
_FD_BYTES: Final = array.array("i").itemsize

T = TypeVar("T")


class ChannelBroken(Exception):
    """The other end sent something that is no message; the channel cannot be used any more."""


def encode_packet(message: object, num_fds: int = 0) -> bytes:
    """``message`` with its header."""
    body = encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise ChannelBroken(f"message of {len(body)} bytes: at most {MAX_MESSAGE_BYTES} fit the zygote's channel")
    return _HEADER.pack(len(body), num_fds) + body


def send_packet(sock: socket.socket, packet: bytes, fds: Sequence[int] = ()) -> int:
    """One ``sendmsg`` of ``packet``; bytes sent. ``fds`` went along if any byte did. Blocks as ``sock`` does."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    return sock.sendmsg([packet], rights, socket.MSG_NOSIGNAL)


class PacketReader(Generic[T]):
    """Reassembles messages of type ``kind``. Owns received descriptors until their message is handed out."""

    def __init__(self, kind: object) -> None:
        self._kind = kind
        self._data = bytearray()
        self._fds: deque[int] = deque()

    def receive(self, sock: socket.socket) -> bool:
        """One ``recvmsg``; False when the other end is gone. Blocks as ``sock`` does."""
        try:
            data, ancillary, flags, _ = sock.recvmsg(
                READ_BYTES, socket.CMSG_SPACE(MAX_FDS_PER_READ * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            return False
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = len(payload) - len(payload) % _FD_BYTES
                self._fds.extend(array.array("i", payload[:whole]))
        if flags & socket.MSG_CTRUNC:
            raise ChannelBroken("file descriptors were lost: the limit of open files (RLIMIT_NOFILE) is too low")
        self._data += data
        return bool(data)

    def messages(self) -> Iterator[tuple[T, tuple[int, ...]]]:
        """Complete messages with their descriptors, which the caller then owns.

        Raises:
            ChannelBroken: over-long, undecodable, or its descriptors did not come along.
        """
        while len(self._data) >= _HEADER.size:
            length, num_fds = _HEADER.unpack_from(self._data)
            if length > MAX_MESSAGE_BYTES:
                raise ChannelBroken(f"message of {length} bytes announced: at most {MAX_MESSAGE_BYTES}")
            end = _HEADER.size + length
            if len(self._data) < end:
                return
            body = bytes(self._data[_HEADER.size : end])
            del self._data[:end]
            if num_fds > len(self._fds):
                raise ChannelBroken(f"message with {num_fds} file descriptors, {len(self._fds)} arrived")
            fds = tuple(self._fds.popleft() for _ in range(num_fds))
            try:
                message: T = decode(body, self._kind)
            except ContractError as error:
                raise ChannelBroken(str(error)) from error
            yield message, fds

    def close(self) -> None:
        """Close descriptors that no message claimed."""
        while self._fds:
            os.close(self._fds.popleft())
