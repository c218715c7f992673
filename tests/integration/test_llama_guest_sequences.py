"""The llama guest's incremental text and stop rules equal a plain Python model, whatever the tokens."""

from __future__ import annotations

import codecs
import random
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama_fixtures import guest_text, loaded_guest, small_spec, smollm2_spec

from guests.abi import SequenceEnd, SequenceFlag
from guests.errors import GuestContractError
from guests.llama_assets import PreTokenizer, TokenizerKind, TokenizerSpec, TokenKind
from guests.runtime import MEBIBYTE, GuestInstance, InstanceLimits
from guests.text import GuestText

EMOJI = "\U0001f44b\U0001f3fd"
# Tokens from 258 on: whole words, pieces that begin and end inside characters, pieces of likely stop strings.
EXTRA = (
    b"ab", b"aab", b"bab", b"a", b"b", "\u00e9".encode(), EMOJI.encode(), EMOJI.encode()[:3], EMOJI.encode()[3:6],
    b"\xf0\x9f", b"\x8b\xf0", b"\xff", b"\xe4\xbd", b"\xed\xa0\x80", b"\n\n", b"END", b"EN", b"D", b"", b" ",
)  # fmt: skip
STOP_TOKEN = 257
SPEC = small_spec(EXTRA)
FAILED = -1

tokens = st.integers(0, len(SPEC.tokens) - 1) | st.sampled_from(range(256, len(SPEC.tokens)))
near_misses = st.sampled_from([*b"abEND", 258, 259, 260, 273, 274])  # what the stop strings below are made of
token_lists = st.lists(tokens, max_size=40) | st.lists(near_misses, max_size=40)
stop_texts = st.sampled_from(
    ["ab", "aab", "aabaaa", "abababb", "ENEND", "b", "END", "\n\n", "\u00e9", EMOJI, EMOJI[1], "\ufffd", "a\ufffd"]
)
stops = st.lists(stop_texts | st.text("abE\u00e9", min_size=1, max_size=4), max_size=3).map(tuple)


@dataclass
class Model:
    """The rules said once more, slowly: decode, then look for a stop string after every byte."""

    stop: tuple[str, ...]
    ignore_stop_tokens: bool = False
    released: bytes = b""
    seen: bytes = b""
    end: SequenceEnd = SequenceEnd.NONE
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )

    def push(self, token: int) -> None:
        if self.end is not SequenceEnd.NONE:
            return
        if token == STOP_TOKEN and not self.ignore_stop_tokens:
            self.flush()
            self.end = self.end or SequenceEnd.STOP_TOKEN
        elif SPEC.kinds[token] is not TokenKind.CONTROL:
            self._take(self.decoder.decode(SPEC.tokens[token]))
            self._release(self._held() if self.end is SequenceEnd.NONE else 0)

    def flush(self) -> None:
        if self.end is SequenceEnd.NONE:
            self._take(self.decoder.decode(b"", final=True))
            self._release(0)

    def _take(self, text: str) -> None:
        for byte in text.encode():
            self.seen += bytes([byte])
            completed = [len(stop.encode()) for stop in self.stop if self.seen.endswith(stop.encode())]
            if completed:
                self.end = SequenceEnd.STOP_STRING
                self.seen = self.seen[: -max(completed)]
                return

    def _held(self) -> int:
        prefixes = {stop.encode()[:size] for stop in self.stop for size in range(len(stop.encode()))}
        return max((len(prefix) for prefix in prefixes if self.seen.endswith(prefix)), default=0)

    def _release(self, held: int) -> None:
        self.released = self.seen[: len(self.seen) - held]


@pytest.fixture(scope="module")
def text() -> Iterator[GuestText]:
    with guest_text(SPEC) as guest:
        yield guest


@given(token_lists, stops, st.booleans())
@example([263, 265, 266, 10, 267, STOP_TOKEN], (), False)
@example([ord("E"), ord("N"), STOP_TOKEN], ("END",), False)
@example([*b"aabaabaaa"], ("aabaaa",), False)
@settings(max_examples=400, deadline=None)
def test_pushes_equal_the_model(
    text: GuestText, token_ids: list[int], stop: tuple[str, ...], ignore_stop_tokens: bool
) -> None:
    """After every push the text so far and the finish are the model's; nothing ends inside a character."""
    model = Model(stop, ignore_stop_tokens)
    sequence = text.open_sequence(stop, ignore_stop_tokens=ignore_stop_tokens)
    try:
        so_far = ""
        for token in token_ids:
            result = sequence.push(token)
            model.push(token)
            so_far += result.text
            assert so_far.encode() == model.released
            assert result.end is model.end
        so_far += sequence.flush()
        model.flush()
        assert so_far.encode() == model.released
    finally:
        sequence.close()


@given(token_lists)
@settings(max_examples=200, deadline=None)
def test_detokenize_is_decoding_with_replacement(text: GuestText, token_ids: list[int]) -> None:
    """detokenize joins the tokens' bytes and decodes as Python does; a sequence without stops gives the same."""
    shown = b"".join(SPEC.tokens[token] for token in token_ids)
    hidden = b"".join(SPEC.tokens[token] for token in token_ids if SPEC.kinds[token] is not TokenKind.CONTROL)
    assert text.detokenize(token_ids, show_special=True) == shown.decode(errors="replace")
    assert text.detokenize(token_ids) == hidden.decode(errors="replace")
    sequence = text.open_sequence((), ignore_stop_tokens=True)
    pushed = "".join(sequence.push(token).text for token in token_ids) + sequence.flush()
    sequence.close()
    assert pushed == hidden.decode(errors="replace")


def test_stop_string_across_tokens_is_held_back_and_never_shown(text: GuestText) -> None:
    """Text that may become a stop string waits; it comes out once it cannot, and the stop string never does."""
    sequence = text.open_sequence(("END",))
    assert [sequence.push(byte).text for byte in b"xENxEN"] == ["x", "", "", "ENx", "", ""]
    last = sequence.push(ord("D"))
    assert (last.text, last.end) == ("", SequenceEnd.STOP_STRING)
    assert (sequence.push(ord("y")).text, sequence.flush()) == ("", "")
    sequence.close()


def test_first_completed_stop_string_wins_and_of_those_the_longest(text: GuestText) -> None:
    """Where two stop strings end together, the longer one cuts more; an earlier end beats an earlier begin."""
    for stop, prompt, shown in ((("b", "ab"), b"xab", "x"), (("abcd", "bc"), b"xabcd", "xa")):
        sequence = text.open_sequence(stop)
        results = [sequence.push(byte) for byte in prompt]
        assert "".join(result.text for result in results) == shown
        assert results[-1].end is SequenceEnd.STOP_STRING
        sequence.close()


def test_stop_token_releases_what_was_held_back(text: GuestText) -> None:
    """A stop token ends the sequence: held text comes out, half a character as U+FFFD, the token itself not."""
    sequence = text.open_sequence(("END",))
    for byte in b"EN\xe4":
        assert sequence.push(byte).text == ""
    last = sequence.push(STOP_TOKEN)
    assert (last.text, last.end) == ("EN\ufffd", SequenceEnd.STOP_TOKEN)
    sequence.close()


def test_a_sequence_goes_on_after_a_flush(text: GuestText) -> None:
    """A flush releases everything and forgets half-matched stop strings; later tokens are text as before."""
    sequence = text.open_sequence(("END",))
    assert [sequence.push(byte).text for byte in b"EN"] == ["", ""]
    assert sequence.flush() == "EN"
    assert sequence.push(ord("D")).text == "D"
    sequence.close()


def test_bad_stop_blocks_are_refused(text: GuestText) -> None:
    """Too many and too long stop strings fail the open, not the guest; empty ones never match."""
    for stop in (("a",) * 257, ("a" * 65_537,)):
        with pytest.raises(GuestContractError, match="gp_sequence_open"):
            text.open_sequence(stop)
    sequence = text.open_sequence(("", "b"))
    assert [sequence.push(byte).end for byte in b"ab"] == [SequenceEnd.NONE, SequenceEnd.STOP_STRING]
    sequence.close()


@pytest.fixture
def instance() -> Iterator[GuestInstance]:
    """The bare exports, in an instance that may grow by little."""
    with loaded_guest(SPEC, padding=5) as module, module.instantiate(InstanceLimits(memory_bytes=8 * MEBIBYTE)) as bare:
        assert bare.call("gp_resume", 0) == 0
        yield bare


def open_raw(instance: GuestInstance, block: bytes, flags: int = 0) -> int:
    pointer = instance.call("gp_buffer", len(block)) & 0xFFFF_FFFF
    instance.write(pointer, block)
    return instance.call("gp_sequence_open", pointer, len(block), flags)


@pytest.mark.parametrize(
    "block",
    [
        b"\x01",
        struct.pack("<I", 1),
        struct.pack("<II", 1, 5) + b"abc",
        struct.pack("<II", 1, 3) + b"abcd",
        struct.pack("<II", 1, 0xFFFF_FFFF) + b"abc",
        struct.pack("<II", 1, 2) + b"\xe4\xbd",
        struct.pack("<I", 0xFFFF_FFFF),
    ],
)
def test_malformed_stop_blocks_are_refused(instance: GuestInstance, block: bytes) -> None:
    """Truncated, over-long and ill-formed blocks give -1 and leave the guest working."""
    assert open_raw(instance, block) == FAILED
    assert open_raw(instance, struct.pack("<II", 1, 1) + b"a") >= 0


def test_closed_and_invented_handles_are_refused(instance: GuestInstance) -> None:
    """A handle dies with its sequence, even when its place is used again."""
    first = open_raw(instance, struct.pack("<I", 0))
    instance.call("gp_sequence_close", first)
    second = open_raw(instance, struct.pack("<I", 0))
    assert second != first
    for handle in (first, 0xFFFF_FFFF, 12345, 0x7FFF_FFFF):
        assert instance.call("gp_sequence_push", handle, 97) == FAILED
        assert instance.call("gp_sequence_flush", handle) == FAILED
        instance.call("gp_sequence_close", handle)
    assert instance.call("gp_sequence_push", second, 97) != FAILED


def test_ids_beyond_the_vocabulary_are_refused_and_padding_is_silent(instance: GuestInstance) -> None:
    """Rows that pad the embedding have no text; ids that the model cannot give fail."""
    handle = open_raw(instance, struct.pack("<I", 0))
    size = len(SPEC.tokens)
    for token in (size, size + 4):
        assert instance.call("gp_sequence_push", handle, token) != FAILED
        assert instance.call("gp_token_bytes", token) & 0xFFFF_FFFF == 0
    for token in (size + 5, 0xFFFF_FFFF):
        assert instance.call("gp_sequence_push", handle, token) == FAILED
        assert instance.call("gp_token_bytes", token) == FAILED


def test_show_special_flag_shows_control_tokens(instance: GuestInstance) -> None:
    """With SHOW_SPECIAL a control token's text is emitted."""
    handle = open_raw(instance, struct.pack("<I", 0), SequenceFlag.SHOW_SPECIAL)
    result = instance.call("gp_sequence_push", handle, 256)
    pointer, length, _ = struct.unpack("<III", instance.read(result >> 32 & 0xFFFF_FFFF, 12))
    assert instance.read(pointer, length) == b"<s>"


def test_output_is_well_formed_before_the_host_decodes_it(instance: GuestInstance) -> None:
    """The guest itself replaces ill-formed bytes: surrogates, overlong forms, beyond U+10FFFF, stray bytes."""
    ill_formed = b"\xed\xa0\x80 \xc0\xaf \xe0\x80\xaf \xf0\x8f\xbf\xbf \xf4\x90\x80\x80 \xf5 \x80 \xe4\xbdx\xf0\x9f\x91"
    ids = array("I", list(ill_formed)).tobytes()
    pointer = instance.call("gp_buffer", len(ids)) & 0xFFFF_FFFF
    instance.write(pointer, ids)
    packed = instance.call("gp_detokenize", pointer, len(ill_formed), 0)
    raw = instance.read(packed >> 32 & 0xFFFF_FFFF, packed & 0xFFFF_FFFF)
    assert raw == ill_formed.decode(errors="replace").encode()


def test_thousands_of_sequences_open_at_once_stay_apart() -> None:
    """5,000 sequences fed in turns give each its own text, and their memory is used again."""
    rng = random.Random(11)
    with guest_text(SPEC, limits=InstanceLimits(memory_bytes=8 * MEBIBYTE)) as text:
        for _ in range(3):
            sequences = [text.open_sequence(("never", "\n\n")) for _ in range(5_000)]
            words = [f"s{number}n" for number in range(5_000)]
            order = list(range(5_000))
            outputs = [""] * 5_000
            for position in range(3):
                rng.shuffle(order)
                for number in order:
                    for byte in words[number].encode()[2 * position : 2 * position + 2]:
                        outputs[number] += sequences[number].push(byte).text
            assert all(
                output + sequence.flush() == word
                for output, sequence, word in zip(outputs, sequences, words, strict=True)
            )
            for sequence in sequences:
                sequence.close()


def test_nothing_leaks_from_call_to_call() -> None:
    """Ten thousand rounds of every call fit into the memory of one."""
    with guest_text(SPEC, limits=InstanceLimits(memory_bytes=3 * MEBIBYTE)) as text:
        for number in range(10_000):
            ids = text.tokenize(f"round {number} " * (number % 7), add_special=True, parse_special=True)
            sequence = text.open_sequence(("x" * (number % 90 + 1),))
            for token in ids[:3]:
                sequence.push(token)
            sequence.close()
            text.detokenize(ids)


SENTENCEPIECE = TokenizerSpec(
    kind=TokenizerKind.SENTENCEPIECE_BPE,
    pre_tokenizer=PreTokenizer.NONE,
    tokens=[b"<unk>", b"<s>", b"</s>", *(bytes([byte]) for byte in range(256)), "\u2581Hi".encode(), "\u2581".encode()],
    kinds=[
        TokenKind.UNKNOWN,
        *[TokenKind.CONTROL] * 2,
        *[TokenKind.BYTE] * 256,
        *[TokenKind.NORMAL] * 2,
    ],
    scores=[0.0] * 261,
    bos_id=1,
    eos_ids=[2],
    unk_id=0,
    add_bos=True,
    add_space_prefix=True,
)


def test_sentencepiece_text_loses_one_leading_space() -> None:
    """U+2581 is a space in text; the dummy prefix of the first visible token goes, later spaces stay."""
    hi, space = 259, 260
    with guest_text(SENTENCEPIECE) as text:
        assert text.detokenize([1, hi, hi, space]) == "Hi Hi "
        assert text.detokenize([1, hi], show_special=True) == "<s> Hi"
        assert text.detokenize([space, hi]) == " Hi"
        assert text.token_bytes(hi) == b" Hi"
        sequence = text.open_sequence(())
        assert [sequence.push(token).text for token in (1, hi, hi, 3 + 0xE4, 3 + 0xBD, 3 + 0xA0)] == [
            "", "Hi", " Hi", "", "", "\u4f60",
        ]  # fmt: skip
        continued = text.open_sequence((), keep_leading_space=True)
        assert [continued.push(token).text for token in (1, hi, hi)] == ["", " Hi", " Hi"]
        stopped = text.open_sequence((" H",), ignore_stop_tokens=True, keep_leading_space=True)
        assert stopped.push(hi).end is SequenceEnd.STOP_STRING
    with guest_text(replace(SENTENCEPIECE, add_space_prefix=False)) as text:
        assert text.detokenize([hi]) == " Hi"


def test_smollm2_text_streams_like_it_decodes() -> None:
    """Real tokens, one by one, give the text of all together, and stop at the model's end of turn."""
    prompt = f"Caf\u00e9 \u4f60\u597d {EMOJI} 12345 \u0645\u0631\u062d\u0628\u0627"
    with guest_text(smollm2_spec()) as text:
        ids = text.tokenize(prompt, add_special=False, parse_special=False)
        sequence = text.open_sequence(("<never>",))
        results = [sequence.push(token) for token in ids]
        assert "".join(result.text for result in results) == prompt
        assert all("\ufffd" not in result.text for result in results)
        assert sequence.push(smollm2_spec().eos_ids[0]).end is SequenceEnd.STOP_TOKEN
