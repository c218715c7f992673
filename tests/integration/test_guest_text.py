"""GuestText: the text protocol over a guest, and what a misbehaving guest can and cannot do to it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from guest_fixtures import bytes_guest, compiled, sealed, toy_guest

from guests.abi import SequenceEnd
from guests.errors import GuestContractError, GuestTrap
from guests.push_result import PushResult
from guests.runtime import GuestEngine, GuestModule, InstanceLimits
from guests.text import GuestText
from worker.engine.text import TextModel

SEED = 0xFEED_FACE_CAFE_BEEF
STOP_TOKEN, UNKNOWN_FINISH, TRAP_TOKEN, WILD_POINTER_TOKEN = 256, 257, 258, 259


@pytest.fixture(scope="module")
def module() -> Iterator[GuestModule]:
    """The byte tokeniser, loaded."""
    with GuestEngine() as engine, sealed(compiled(bytes_guest().baked_wasm)) as path:
        engine.start_ticker()
        loaded = engine.load(path)
        yield loaded
        loaded.close()


@pytest.fixture
def text(module: GuestModule) -> Iterator[GuestText]:
    """A text side of its own for each test."""
    model = GuestText(module, SEED)
    yield model
    model.close()


def test_it_is_a_text_model(text: GuestText) -> None:
    """GuestText implements the worker's protocol by structure (checked by mypy) and answers all of it."""
    model: TextModel = text
    assert model.tokenize("héé", add_special=False, parse_special=False) == list("héé".encode())
    assert model.tokenize("a", add_special=True, parse_special=True) == [STOP_TOKEN, 97]
    assert model.tokenize("", add_special=False, parse_special=False) == []
    assert model.detokenize([72, 105, STOP_TOKEN]) == "Hi"
    assert model.detokenize([72, STOP_TOKEN], show_special=True) == "H#"
    assert model.detokenize([]) == ""
    assert model.detokenize([0xC3]) == "�"
    assert model.token_bytes(0xFF) == b"\xff"


def test_lone_surrogates_become_replacement_characters(text: GuestText) -> None:
    """Text that JSON can carry but UTF-8 cannot does not raise."""
    ids = text.tokenize("a\ud800b\ud83d\ude00", add_special=False, parse_special=False)
    assert bytes(ids).decode() == "a�b😀"


def test_the_seed_arrives_and_init_does_not_run_again(text: GuestText) -> None:
    """gp_resume gets the 64-bit seed; the init counter in the snapshot stays at one."""
    assert struct.unpack("<Q", text.token_bytes(1000)) == (SEED,)
    assert struct.unpack("<Q", text.token_bytes(1001)) == (1,)


def test_sequences_are_independent_and_reusable(text: GuestText) -> None:
    """Each choice has its own state; closing frees it for the next, and closing twice is fine."""
    first, second = text.open_sequence(()), text.open_sequence(("stop", "é"), ignore_stop_tokens=True)
    assert first.push(65) == PushResult("A1", SequenceEnd.NONE)
    assert second.push(66) == PushResult("B1", SequenceEnd.NONE)
    assert first.push(67) == PushResult("C2", SequenceEnd.NONE)
    assert first.push(STOP_TOKEN) == PushResult("", SequenceEnd.STOP_TOKEN)
    assert first.flush() == "3"
    first.close()
    first.close()
    with pytest.raises(GuestContractError, match="closed"):
        first.push(65)
    assert text.open_sequence(()).push(68).text == "D1"


def test_too_many_sequences_is_an_error_and_not_a_crash(text: GuestText) -> None:
    """The guest's own limit is reported, and closing one makes room."""
    opened = [text.open_sequence(()) for _ in range(4)]
    with pytest.raises(GuestContractError, match="gp_sequence_open failed"):
        text.open_sequence(())
    opened[0].close()
    text.open_sequence(())


@pytest.mark.parametrize("attack", ["trap!", "spin!", "deep!"])
def test_a_trap_costs_the_open_sequences_and_nothing_else(module: GuestModule, attack: str) -> None:
    """The call raises GuestTrap, sequences of the old instance too, and the next call works on a fresh one."""
    text = GuestText(module, SEED, InstanceLimits(call_deadline_ms=500))
    sequence = text.open_sequence(())
    with pytest.raises(GuestTrap):
        text.tokenize(attack, add_special=False, parse_special=False)
    with pytest.raises(GuestTrap):
        sequence.push(65)
    with pytest.raises(GuestTrap):
        sequence.flush()
    sequence.close()
    assert text.tokenize("ok", add_special=False, parse_special=False) == [111, 107]
    assert struct.unpack("<Q", text.token_bytes(1000)) == (SEED,)
    assert text.open_sequence(()).push(65).text == "A1"
    text.close()


def test_a_trap_in_one_sequence_ends_all_of_them(text: GuestText) -> None:
    """Sequences share an instance, so the trap of one is seen by the others, each as GuestTrap."""
    bad, good = text.open_sequence(()), text.open_sequence(())
    with pytest.raises(GuestTrap):
        bad.push(TRAP_TOKEN)
    with pytest.raises(GuestTrap):
        good.push(65)


def test_pointers_out_of_range_are_a_broken_contract(text: GuestText) -> None:
    """A result that points outside memory raises and closes the instance, whose state is not to be trusted."""
    with pytest.raises(GuestContractError, match="outside its memory"):
        text.tokenize("wild!", add_special=False, parse_special=False)
    sequence = text.open_sequence(())
    with pytest.raises(GuestContractError, match="outside its memory"):
        sequence.push(WILD_POINTER_TOKEN)
    with pytest.raises(GuestTrap):
        sequence.push(65)
    assert text.tokenize("ok", add_special=False, parse_special=False) == [111, 107]


def test_reported_failures_leave_the_instance_alone(text: GuestText) -> None:
    """-1 from the guest is an error of that call only."""
    sequence = text.open_sequence(())
    with pytest.raises(GuestContractError, match="gp_tokenize failed"):
        text.tokenize("fail!", add_special=False, parse_special=False)
    with pytest.raises(GuestContractError, match="no memory for"):
        text.tokenize("x" * 100_000, add_special=False, parse_special=False)
    with pytest.raises(GuestContractError, match="gp_token_bytes failed"):
        text.token_bytes(5_000)
    with pytest.raises(GuestContractError, match="32-bit"):
        text.detokenize([-1])
    with pytest.raises(GuestContractError):
        text.token_bytes(-1)
    assert sequence.push(65).text == "A1"


def test_an_unknown_finish_is_a_broken_contract(text: GuestText) -> None:
    """A finish outside the ABI is not passed on."""
    sequence = text.open_sequence(())
    with pytest.raises(GuestContractError, match="unknown finish 9"):
        sequence.push(UNKNOWN_FINISH)


def test_a_closed_text_side_stays_closed(module: GuestModule) -> None:
    """close ends calls and sequences; it is idempotent and does not open a fresh instance."""
    text = GuestText(module, 1)
    sequence = text.open_sequence(())
    text.close()
    text.close()
    with pytest.raises(GuestContractError, match="closed"):
        text.tokenize("a", add_special=False, parse_special=False)
    with pytest.raises(GuestTrap):
        sequence.push(65)
    sequence.close()


def test_a_guest_without_a_tokeniser_says_so() -> None:
    """The toy resumes, and asking it for tokens names the missing export."""
    with GuestEngine() as engine, sealed(compiled(toy_guest().baked_wasm)) as path:
        toy = engine.load(path)
        text = GuestText(toy, 1)
        with pytest.raises(GuestContractError, match="does not export the function gp_buffer"):
            text.tokenize("a", add_special=False, parse_special=False)
        text.close()
        toy.close()
