"""Guests that attack while they serve: each attack ends as an error of that request, and the next request is right."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hostile_guests import EXPORTS, LIES, LIMITS, TRAPS, hostile_guest

from guests.errors import GuestContractError, GuestError, GuestTrap
from guests.runtime import TRAP_INTERRUPT, GuestEngine, GuestModule
from guests.text import GuestText
from tests.eventually import eventually_sync

Request = Callable[[GuestText], object]


def push_attacked(text: GuestText) -> object:
    return text.open_sequence(()).push(33)


def flush_attacked(text: GuestText) -> object:
    sequence = text.open_sequence(())
    sequence.push(34)
    return sequence.flush()


def close_attacked(text: GuestText) -> object:
    sequence = text.open_sequence(())
    sequence.push(34)
    return sequence.close()


#: A request that springs the attack in each export.
ATTACKED: dict[str, Request] = {
    "gp_buffer": lambda text: text.tokenize("x" * 33, add_special=False, parse_special=False),
    "gp_tokenize": lambda text: text.tokenize("!", add_special=False, parse_special=False),
    "gp_detokenize": lambda text: text.detokenize([33]),
    "gp_token_bytes": lambda text: text.token_bytes(33),
    "gp_sequence_open": lambda text: text.open_sequence(("!",)),
    "gp_sequence_push": push_attacked,
    "gp_sequence_flush": flush_attacked,
    "gp_sequence_close": close_attacked,
}


@contextmanager
def loaded(wasm: bytes) -> Iterator[GuestModule]:
    """The guest in an engine whose deadlines pass."""
    with GuestEngine() as engine:
        engine.start_ticker()
        module = engine.compile(wasm)
        yield module
        module.close()


def assert_serves(text: GuestText) -> None:
    """A whole honest request gives the right answer."""
    assert text.tokenize("abc", add_special=True, parse_special=False) == [97, 98, 99]
    assert text.detokenize([97, 98]) == "ab"
    assert text.token_bytes(65) == b"A"
    sequence = text.open_sequence(("z",))
    assert [sequence.push(token).text for token in (72, 105)] == ["H", "i"]
    assert sequence.flush() == ""
    sequence.close()


@pytest.mark.parametrize("export", ATTACKED)
@pytest.mark.parametrize("attack", TRAPS)
def test_threat_hostile_guest(export: str, attack: str) -> None:
    """Every attack in every export of the tokeniser: a clear error, and the same text side serves on."""
    code, reason = TRAPS[attack]
    with loaded(hostile_guest(export, code)) as module:
        text = GuestText(module, 1, LIMITS)
        assert_serves(text)
        for _ in range(2):
            with pytest.raises(GuestError, match=reason):
                ATTACKED[export](text)
            assert_serves(text)
        text.close()


@pytest.mark.parametrize(
    "export", ["gp_tokenize", "gp_detokenize", "gp_token_bytes", "gp_sequence_push", "gp_sequence_flush"]
)
@pytest.mark.parametrize("lie", LIES)
def test_threat_hostile_guest_lies(export: str, lie: str) -> None:
    """Pointers and lengths outside of memory, or beyond what a result may be, cost the host no copy and no crash."""
    with loaded(hostile_guest(export, f"(i64.const {LIES[lie]})")) as module:
        text = GuestText(module, 1, LIMITS)
        with pytest.raises(GuestContractError):
            ATTACKED[export](text)
        assert_serves(text)
        text.close()


@pytest.mark.parametrize(
    ("text_at", "length", "finish", "reason"),
    [
        (-8, 64, 0, "outside its memory"),
        (0, -1, 0, "a text of 4294967295 bytes"),
        (0, 65_537, 0, "a text of 65537 bytes"),
        (32_768, 1, 3, "unknown finish 3"),
        (32_768, 1, -1, "unknown finish 4294967295"),
    ],
)
def test_a_push_result_that_lies_is_refused(text_at: int, length: int, finish: int, reason: str) -> None:
    """The structure behind a push is checked field by field."""
    attack = f"""(i32.store (i32.const 1024) (i32.const {text_at})) (i32.store (i32.const 1028) (i32.const {length}))
                 (i32.store (i32.const 1032) (i32.const {finish})) (call $pack (i32.const 1024) (i32.const 12))"""
    with loaded(hostile_guest("gp_sequence_push", attack)) as module:
        text = GuestText(module, 1, LIMITS)
        with pytest.raises(GuestContractError, match=reason):
            push_attacked(text)
        assert_serves(text)
        text.close()


@pytest.mark.parametrize("length", [0, 11, 13])
def test_a_push_result_of_another_size_is_refused(length: int) -> None:
    """Twelve bytes, not more, not fewer."""
    with loaded(hostile_guest("gp_sequence_push", f"(call $pack (i32.const 1024) (i32.const {length}))")) as module:
        text = GuestText(module, 1, LIMITS)
        with pytest.raises(GuestContractError, match=r"items|bytes, not 12"):
            push_attacked(text)
        assert_serves(text)
        text.close()


@pytest.mark.parametrize("pointer", ["-1", "65535", "0x7fffffff", "0x80000000", "65504"])
def test_an_input_buffer_out_of_range_is_refused(pointer: str) -> None:
    """A guest cannot make the host write outside its memory."""
    with loaded(hostile_guest("gp_buffer", f"(i32.const {pointer})")) as module:
        text = GuestText(module, 1, LIMITS)
        with pytest.raises(GuestContractError, match="outside its memory"):
            ATTACKED["gp_buffer"](text)
        assert_serves(text)
        text.close()


@pytest.mark.parametrize("handle", ["-1", "-2", "0x80000000"])
def test_a_negative_sequence_handle_is_a_failure(handle: str) -> None:
    """No sequence is made of it."""
    with loaded(hostile_guest("gp_sequence_open", f"(i32.const {handle})")) as module:
        text = GuestText(module, 1, LIMITS)
        with pytest.raises(GuestContractError, match="gp_sequence_open failed"):
            text.open_sequence(("!",))
        assert_serves(text)
        text.close()


def test_an_invented_sequence_handle_goes_nowhere_but_to_the_guest() -> None:
    """A handle is the guest's own number: any value comes back to it and to nobody else."""
    with loaded(hostile_guest("gp_sequence_open", "(i32.const 0x7fffffff)")) as module:
        text = GuestText(module, 1, LIMITS)
        sequence = text.open_sequence(("!",))
        assert sequence.push(65).text == "A"
        sequence.close()
        assert_serves(text)
        text.close()


def test_text_that_is_not_utf8_becomes_replacement_characters() -> None:
    """Wherever a guest gives bytes for text, invalid ones are U+FFFD."""
    broken = "(i64.store (i32.const 32768) (i64.const 0x41fffe80c0f5edff))"
    push = f"""{broken} (i32.store (i32.const 1024) (i32.const 32768)) (i32.store (i32.const 1028) (i32.const 8))
               (i32.store (i32.const 1032) (i32.const 0)) (call $pack (i32.const 1024) (i32.const 12))"""
    for export, attack in (
        ("gp_detokenize", f"{broken} (call $pack (i32.const 32768) (i32.const 8))"),
        ("gp_sequence_push", push),
        ("gp_sequence_flush", f"{broken} (call $pack (i32.const 32768) (i32.const 8))"),
    ):
        with loaded(hostile_guest(export, attack)) as module:
            text = GuestText(module, 1, LIMITS)
            got = ATTACKED[export](text)
            shown = got if isinstance(got, str) else getattr(got, "text", "")
            assert shown.endswith("A")
            assert "\ufffd" in shown
            assert shown.encode().decode() == shown
            assert_serves(text)
            text.close()


def test_a_sequence_that_never_releases_text_and_never_ends_stays_bounded() -> None:
    """A guest that swallows every token: pushes stay cheap and empty; whoever counts tokens ends it."""
    swallow = """(i32.store (i32.const 1024) (i32.const 0)) (i32.store (i32.const 1028) (i32.const 0))
                 (i32.store (i32.const 1032) (i32.const 0)) (call $pack (i32.const 1024) (i32.const 12))"""
    with loaded(hostile_guest("gp_sequence_push", swallow)) as module:
        text = GuestText(module, 1, LIMITS)
        sequence = text.open_sequence(())
        assert {sequence.push(33).text for _ in range(2_000)} == {""}
        assert sequence.flush() == ""
        sequence.close()
        assert_serves(text)
        text.close()


def test_a_guest_that_emits_without_end_is_cut_off() -> None:
    """Text of the largest size on every push is passed on; one byte more ends the instance."""
    for length, is_refused in ((LIMITS.result_bytes, False), (LIMITS.result_bytes + 1, True)):
        attack = f"""(drop (memory.grow (i32.const 2))) (i32.store (i32.const 1024) (i32.const 65536))
                     (i32.store (i32.const 1028) (i32.const {length})) (i32.store (i32.const 1032) (i32.const 0))
                     (call $pack (i32.const 1024) (i32.const 12))"""
        with loaded(hostile_guest("gp_sequence_push", attack)) as module:
            text = GuestText(module, 1, LIMITS)
            sequence = text.open_sequence(())
            if is_refused:
                with pytest.raises(GuestContractError, match="at most 65536"):
                    sequence.push(33)
            else:
                assert {len(sequence.push(33).text) for _ in range(20)} == {length}
            assert_serves(text)
            text.close()


def test_more_tokens_than_a_text_can_have_are_refused() -> None:
    """The bound on ids follows the input: a short prompt cannot become millions of tokens in the host."""
    attack = "(drop (memory.grow (i32.const 8))) (call $pack (i32.const 0) (i32.const 2000))"
    with loaded(hostile_guest("gp_tokenize", attack)) as module:
        text = GuestText(module, 1, LIMITS)
        with pytest.raises(GuestContractError, match="2000 items: at most 1040"):
            ATTACKED["gp_tokenize"](text)
        assert_serves(text)
        text.close()


@pytest.mark.parametrize("attack", TRAPS)
def test_a_resume_that_attacks_makes_no_text_side(attack: str) -> None:
    """An instance that cannot be resumed is an error for whoever restores; another seed of the same module works."""
    code, reason = TRAPS[attack]
    with loaded(hostile_guest("gp_resume", code)) as module:
        with pytest.raises(GuestError, match=reason):
            GuestText(module, 33, LIMITS)
        text = GuestText(module, 34, LIMITS)
        assert_serves(text)
        text.close()


def test_a_resume_that_reports_failure_is_an_error() -> None:
    """A code other than 0 is named."""
    with (
        loaded(hostile_guest("gp_resume", "(i32.const 77)")) as module,
        pytest.raises(GuestContractError, match="gp_resume failed with code 77"),
    ):
        GuestText(module, 33, LIMITS)


def test_traps_in_a_row_do_not_wedge_the_text_side() -> None:
    """Fifty requests that trap, one after the other, each on its own fresh instance; the next is right."""
    with loaded(hostile_guest("gp_tokenize", "(unreachable)")) as module:
        text = GuestText(module, 1, LIMITS)
        for _ in range(50):
            with pytest.raises(GuestTrap):
                ATTACKED["gp_tokenize"](text)
        assert_serves(text)
        text.close()


def test_an_interrupted_loop_is_told_from_other_traps() -> None:
    """The deadline's trap has its own code, so that callers can tell slow from broken."""
    with loaded(hostile_guest("gp_tokenize", TRAPS["endless loop"][0])) as module:
        text = GuestText(module, 1, LIMITS)
        with pytest.raises(GuestTrap) as caught:
            ATTACKED["gp_tokenize"](text)
        assert caught.value.code == TRAP_INTERRUPT
        text.close()


def test_attacks_leave_no_descriptor_and_no_thread() -> None:
    """A hundred dropped instances leave the process as it was."""
    with loaded(hostile_guest("gp_tokenize", "(unreachable)")) as module:
        text = GuestText(module, 1, LIMITS)
        num_descriptors, num_threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        for _ in range(100):
            with pytest.raises(GuestTrap):
                ATTACKED["gp_tokenize"](text)
        assert len(os.listdir("/proc/self/fd")) == num_descriptors
        eventually_sync(lambda: len(os.listdir("/proc/self/task")) <= num_threads, what="no thread more")
        text.close()


def test_every_export_of_the_abi_is_attacked() -> None:
    """A new export cannot be forgotten here."""
    from guests.signatures import EXPORTS as ABI_EXPORTS

    assert set(EXPORTS) == set(ABI_EXPORTS)
    assert set(ATTACKED) | {"gp_abi", "gp_init", "gp_resume"} == set(ABI_EXPORTS)
