"""Text behind a post-processor: line by line, the rest at the end, failures of one request only."""

from __future__ import annotations

import msgspec
import pytest

from guests.abi import SequenceEnd
from guests.errors import GuestTrap
from scheduler.contract.messages import SamplingParams
from scheduler.contract.states import FinishReason
from tests.engine_fixtures import EngineHarness
from tests.engine_fixtures import FakeText as WordsText
from worker.engine.post_processing import MAX_HELD_CHARACTERS, PostProcessedText, PostProcessingFailed
from worker.engine.text import PushResult
from worker.engine.types import EngineRequest


class FakeSequence:
    """Gives the pieces that it was made with, one a push."""

    def __init__(self, pieces: list[str], end: SequenceEnd = SequenceEnd.NONE, rest: str = "") -> None:
        self.pieces = pieces
        self.end = end
        self.rest = rest
        self.is_closed = False

    def push(self, token_id: int) -> PushResult:
        piece = self.pieces.pop(0)
        return PushResult(piece, SequenceEnd.NONE if self.pieces else self.end)

    def flush(self) -> str:
        return self.rest

    def close(self) -> None:
        self.is_closed = True


class FakeText:
    """A tokeniser of one letter a token."""

    def __init__(self, sequence: FakeSequence) -> None:
        self.sequence = sequence

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [ord(letter) for letter in text]

    def detokenize(self, token_ids: list[int], *, show_special: bool = False) -> str:
        return "".join(map(chr, token_ids))

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def open_sequence(
        self, stop: tuple[str, ...], *, ignore_stop_tokens: bool = False, keep_leading_space: bool = False
    ) -> FakeSequence:
        return self.sequence


class Brackets:
    """Shows what each call got."""

    def post_process(self, text: str) -> str:
        if "bad" in text:
            raise GuestTrap("it raised")
        return f"[{text}]"


def run(sequence: FakeSequence) -> tuple[list[str], str]:
    """Text of each push, and of the flush."""
    opened = PostProcessedText(FakeText(sequence), Brackets()).open_sequence(())
    pushed = [opened.push(0).text for _ in range(len(sequence.pieces))]
    return pushed, opened.flush()


def test_whole_lines_go_out_and_the_rest_at_the_end() -> None:
    """Pieces that end no line are held; one that ends two lines gives both at once; nothing is called for nothing."""
    assert run(FakeSequence(["a", "b\n", "", "c\nd\ne", "f"], rest="g")) == (
        ["", "[ab\n]", "", "[c\nd\n]", ""],
        "[efg]",
    )
    assert run(FakeSequence([""])) == ([""], "")


def test_a_stop_string_releases_what_was_held() -> None:
    """No flush follows a stop string, so the push itself gives all of it; behind a stop token the flush does."""
    assert run(FakeSequence(["a", "b"], SequenceEnd.STOP_STRING)) == (["", "[ab]"], "")
    assert run(FakeSequence(["a", "b"], SequenceEnd.STOP_TOKEN)) == (["", ""], "[ab]")


def test_an_endless_line_is_handed_over_in_parts() -> None:
    """What is held back has a bound."""
    piece = "x" * (MAX_HELD_CHARACTERS // 2)
    pushed, rest = run(FakeSequence([piece, piece, "y", "z"]))
    assert pushed == ["", "", f"[{piece}{piece}y]", ""]
    assert rest == "[z]"


def test_a_trap_is_the_failure_of_one_request() -> None:
    """Not a GuestTrap, which would have the engine rebuild the tokeniser's state and try again."""
    sequence = FakeSequence(["bad\n"])
    opened = PostProcessedText(FakeText(sequence), Brackets()).open_sequence(())
    with pytest.raises(PostProcessingFailed, match="post-processor: it raised") as caught:
        opened.push(0)
    assert not isinstance(caught.value, GuestTrap)
    opened.close()
    assert sequence.is_closed


def test_the_tokeniser_is_the_models_own() -> None:
    """Only sequences are post-processed."""
    text = PostProcessedText(FakeText(FakeSequence([])), Brackets())
    assert text.tokenize("ab", add_special=True, parse_special=True) == [97, 98]
    assert text.detokenize([97]) == "a"
    assert text.token_bytes(97) == b"a"


def test_the_stop_string_is_named_by_the_models_own_text() -> None:
    """A post-processor, which rewrites and holds back lines, has no say in which of several stop strings ended it."""
    sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=8, ignore_eos=True)
    third = EngineHarness().complete(EngineRequest("free", "5 6 7", sampling)).token_ids()[2]
    stop = ("<9999>", f"<{third}>", "never")
    harness = EngineHarness(text=PostProcessedText(WordsText(), Brackets()))
    events = harness.complete(EngineRequest("r", "5 6 7", msgspec.structs.replace(sampling, stop=stop))).events
    assert events[-1].finish_reason is FinishReason.STOP
    assert events[-1].stop_sequence == f"<{third}>"
