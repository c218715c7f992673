"""Framing of the zygote's socket: any cut of the bytes gives the same messages, and nonsense is refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.spawn_order import FromZygote, WorkerExited, WorkerForked
from worker.zygote_channel import MAX_MESSAGE_BYTES, ChannelBroken, PacketReader, encode_packet, send_packet


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@given(
    ids=st.lists(st.text(max_size=40), min_size=1, max_size=8),
    cut=st.integers(min_value=1, max_value=50),
)
def test_messages_survive_any_cut(ids: list[str], cut: int) -> None:
    """Whatever pieces arrive, the messages come out whole and in order."""
    messages = [WorkerForked(worker_id, number) for number, worker_id in enumerate(ids)]
    data = b"".join(encode_packet(message) for message in messages)
    ours, theirs = socket.socketpair()
    reader: PacketReader[FromZygote] = PacketReader(FromZygote)
    seen: list[FromZygote] = []
    with ours, theirs:
        for start in range(0, len(data), cut):
            ours.sendall(data[start : start + cut])
            assert reader.receive(theirs)
            seen += [message for message, _ in reader.messages()]
    assert seen == messages


def test_descriptors_go_to_the_message_they_came_with(pair: tuple[socket.socket, socket.socket]) -> None:
    """Of three messages read at once, each gets its own descriptors; unclaimed ones are closed."""
    ours, theirs = pair
    pipes = [os.pipe() for _ in range(2)]
    send_packet(ours, encode_packet(WorkerForked("a", 1), 1), [pipes[0][1]])
    send_packet(ours, encode_packet(WorkerForked("b", 2)))
    send_packet(ours, encode_packet(WorkerForked("c", 3), 1), [pipes[1][1]])
    reader: PacketReader[FromZygote] = PacketReader(FromZygote)
    seen: dict[str, tuple[int, ...]] = {}
    while len(seen) < 3:
        assert reader.receive(theirs)
        seen.update({message.worker_id: fds for message, fds in reader.messages()})  # type: ignore[union-attr]
    assert seen["b"] == ()
    for number, worker_id in enumerate("ac"):
        os.write(seen[worker_id][0], worker_id.encode())
        assert os.read(pipes[number][0], 1) == worker_id.encode()
    for fd in (*seen["a"], *seen["c"], *pipes[0], *pipes[1]):
        os.close(fd)
    reader.close()


def test_closed_end_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    """The other side's end is no error but an answer."""
    ours, theirs = pair
    ours.close()
    assert not PacketReader(FromZygote).receive(theirs)


@pytest.mark.parametrize(
    "data",
    [
        (MAX_MESSAGE_BYTES + 1).to_bytes(4, "little") + b"\0",
        b"\1\0\0\0\0\xc1",
        encode_packet(WorkerExited("a", 1, 0), 2),
    ],
    ids=["announces too much", "no message", "descriptors that did not come"],
)
def test_nonsense_is_refused(pair: tuple[socket.socket, socket.socket], data: bytes) -> None:
    """Bytes that are no message of ours end the channel instead of being guessed at."""
    ours, theirs = pair
    ours.sendall(data)
    reader: PacketReader[FromZygote] = PacketReader(FromZygote)
    reader.receive(theirs)
    with pytest.raises(ChannelBroken):
        list(reader.messages())


def test_exit_code_names_the_signal() -> None:
    """A wait status becomes an exit code, negative for a signal."""
    assert WorkerExited("a", 1, 7 << 8).exit_code == 7
    assert WorkerExited("a", 1, 9).exit_code == -9
