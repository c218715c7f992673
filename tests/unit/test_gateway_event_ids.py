"""Ids of a stream's events: what a client that comes back is given, and what it may send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.contract.errors import GlowplugError
from scheduler.gateway.event_ids import EventIds, read_event_id
from scheduler.gateway.request_ids import create_request_id


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.data())
def test_any_interleaving_resumed_anywhere_gives_each_event_once(order: list[int], data: st.DataObject) -> None:
    """Prompts' events interleave differently at each gateway; seen and rest together are all events, none twice."""
    request_id = create_request_id()
    first = EventIds(request_id, 3)
    sent = [(part, first.next(part)) for part in order]
    cut = data.draw(st.integers(0, len(sent)))
    seen: tuple[int, ...] = ()
    if cut:
        last_id = sent[cut - 1][1]
        assert last_id is not None
        named, seen = read_event_id(last_id.decode())
        assert named == request_id
    replayed = EventIds(request_id, 3, seen)
    again = data.draw(st.permutations(order))
    rest = [part for part in again if replayed.next(part) is not None]
    delivered = [part for part, _ in sent[:cut]] + rest
    assert sorted(delivered) == sorted(order)


@pytest.mark.parametrize("text", ["", "x", "1.", "-1", "1:2:3", "9" * 10, "1" * 300, "nonsense:4", "\u0664"])
def test_what_is_no_id_of_ours_is_refused_by_name(text: str) -> None:
    """Anything but our own form is a 400 that names the header."""
    with pytest.raises(GlowplugError) as refused:
        read_event_id(text)
    assert refused.value.info.param == "Last-Event-ID"


def test_a_bare_count_names_no_request() -> None:
    """The path names the request then."""
    assert read_event_id(" 12 ") == ("", (12,))
