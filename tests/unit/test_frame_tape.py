"""What a tape is given comes back: same frames, same order."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from scheduler.gateway.frame_tape import FrameTape


@given(st.lists(st.binary(max_size=300)))
def test_frames_come_back_as_they_were(frames: list[bytes]) -> None:
    """Empty ones too."""
    tape = FrameTape()
    for frame in frames:
        tape.append(frame)
    assert list(tape) == frames
    assert len(tape) == len(frames)


def test_small_frames_take_little() -> None:
    """A thousand frames of 30 bytes: less than 45 bytes each, where a list of them takes more than 70."""
    tape, listed = FrameTape(), [bytes([i % 256]) * 30 for i in range(1000)]
    for frame in listed:
        tape.append(frame)
    assert sys.getsizeof(tape._data) < 45 * 1000
    assert sys.getsizeof(listed) + sum(map(sys.getsizeof, listed)) > 70 * 1000
