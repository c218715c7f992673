"""Reading tool calls out of a model's text, as it comes.

What looked like a call and is none comes out as the text that it is: nothing that the model wrote is lost, and the
parts make the same whatever the pieces in which the text arrives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from scheduler.contract.messages import TokenEvent
from scheduler.gateway.call_scanner import BLANKS, CallScanner, Phase
from scheduler.gateway.tool_styles import HERMES_CLOSE, HERMES_OPEN, LLAMA_OPEN, MISTRAL_OPEN, ToolStyle

CALL_ID_CHARS: Final = 9  # Mistral's templates accept no other length


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What the answer to a call may be: calls of these functions, written in this style, beside text."""

    style: ToolStyle
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text for people."""

    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A call begins."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the JSON text of the newest call's arguments."""

    index: int
    text: str


Delta = TextDelta | CallDelta | ArgumentsDelta


@dataclass(slots=True)
class ToolCall:
    """A call as gathered; ``arguments`` is JSON text, cut short where the completion was."""

    call_id: str
    name: str
    arguments: str = ""


def make_call_id(seed: str, index: int) -> str:
    """The id of call ``index`` of one choice: the same each time that its events are made."""
    return hashlib.blake2s(f"{seed}:{index}".encode(), digest_size=8).hexdigest()[:CALL_ID_CHARS]


def gather(deltas: Iterable[Delta]) -> list[str | ToolCall]:
    """Text and calls in the order in which the model wrote them."""
    items: list[str | ToolCall] = []
    for delta in deltas:
        newest = items[-1] if items else None
        match delta:
            case TextDelta(text):
                if isinstance(newest, str):
                    items[-1] = newest + text
                else:
                    items.append(text)
            case CallDelta(_, call_id, name):
                items.append(ToolCall(call_id, name))
            case ArgumentsDelta(_, text):
                if isinstance(newest, ToolCall):
                    newest.arguments += text
    return items


class ToolCallParser:
    """One choice's text becomes text and calls. :meth:`finish` once, when the text has ended."""

    def __init__(self, use: ToolUse, seed: str) -> None:
        """``seed`` names the choice; ids of calls are made of it."""
        self.num_calls = 0
        self._use = use
        self._seed = seed
        self._buffer = ""  # not looked at yet, or too short to tell
        self._raw = ""  # what becomes text again if the call under way is none
        self._scanner: CallScanner | None = None
        self._has_begun = False  # the call under way has been told
        self._in_list = False  # inside Mistral's brackets
        self._at_start = True  # only blanks so far
        self._blanks = ""  # held back: dropped before a call, given out before text
        self._deltas: list[Delta] = []

    def feed(self, text: str) -> list[Delta]:
        """What ``text`` adds."""
        self._buffer += text
        while self._buffer and self._advance():
            pass
        return self._take()

    def finish(self) -> list[Delta]:
        """What was held back until now."""
        if self._scanner is not None and not self._has_begun:
            self._give_up()
        self._emit_text(self._buffer)
        self._buffer = ""
        if self.num_calls == 0 and self._blanks:
            self._deltas.append(TextDelta(self._blanks))
        return self._take()

    def _take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _advance(self) -> bool:
        """One step; whether to go on with what is left in the buffer."""
        return self._scan() if self._scanner is not None else self._look()

    # --- outside of a call ------------------------------------------------------------------------------------------

    def _look(self) -> bool:
        if self._in_list or (self.num_calls and self._use.style is not ToolStyle.HERMES):
            return self._look_for_next()
        if self._at_start and self._use.style is not ToolStyle.HERMES:
            return self._look_at_start()
        opening = HERMES_OPEN if self._use.style is ToolStyle.HERMES else MISTRAL_OPEN
        if self._use.style is ToolStyle.LLAMA:
            opening = LLAMA_OPEN
        before, found, after = self._buffer.partition(opening)
        if found:
            self._emit_text(before)
            self._buffer = after
            self._begin(opening)
            return True
        held = _overlap(self._buffer, opening)
        self._emit_text(self._buffer[: len(self._buffer) - held])
        self._buffer = self._buffer[len(self._buffer) - held :]
        return False

    def _look_at_start(self) -> bool:
        """A call may stand without its mark: marks that are special tokens never become text."""
        text = self._buffer.lstrip(BLANKS)
        mark, bare = (LLAMA_OPEN, "{") if self._use.style is ToolStyle.LLAMA else (MISTRAL_OPEN, "[")
        if len(text) < len(mark) and mark.startswith(text):
            return False
        self._at_start = False
        blanks = self._buffer[: len(self._buffer) - len(text)]
        if text.startswith(mark):
            self._begin(blanks + mark)
            self._buffer = text[len(mark) :]
        elif text.startswith(bare):
            self._begin(blanks)
            self._buffer = text
        return True

    def _look_for_next(self) -> bool:
        """After a call of a style whose calls follow each other: the next one, the end of the list, or text."""
        text = self._buffer.lstrip(BLANKS)
        if not text:
            return False
        separator = "," if self._in_list else ";"
        if self._in_list and text[0] == "]":
            self._in_list, self._buffer = False, text[1:]
        elif text[0] == separator:
            self._raw, self._buffer = separator, text[1:]
            self._scanner, self._has_begun = CallScanner(self._use.names), False
        elif self._use.style is ToolStyle.LLAMA and text[0] == "{":
            self._begin("")
            self._buffer = text
        else:
            self._emit_text(self._buffer)
            self._buffer, self._in_list = "", False
            return False
        return True

    def _begin(self, opening: str) -> None:
        self._at_start = False
        self._raw = opening
        self._scanner, self._has_begun = CallScanner(self._use.names), False

    # --- inside of a call -------------------------------------------------------------------------------------------

    def _scan(self) -> bool:
        scanner = self._scanner
        if scanner is None:
            raise RuntimeError("no call is being read")
        text, self._buffer = self._buffer, ""
        for i, character in enumerate(text):
            if scanner.phase is Phase.DONE:
                self._buffer = text[i:]
                return self._end()
            self._raw += character
            is_list = self._use.style is ToolStyle.MISTRAL and not self._in_list and scanner.phase is Phase.OPEN
            if is_list and character == "[":
                self._in_list = True
                continue
            scanner.push(character)
            if scanner.phase is Phase.FAILED:
                self._buffer = text[i + 1 :]
                self._give_up()
                return bool(self._buffer)
        self._tell(scanner)
        if scanner.phase is Phase.DONE and self._use.style is not ToolStyle.HERMES:
            return self._end()
        return False

    def _tell(self, scanner: CallScanner) -> None:
        """Hand on what is certain."""
        if not scanner.is_call or scanner.name is None:
            return
        if not self._has_begun:
            self._has_begun, self._raw, self._blanks = True, "", ""
            self._deltas.append(CallDelta(self.num_calls, make_call_id(self._seed, self.num_calls), scanner.name))
            self.num_calls += 1
        arguments = scanner.take()
        if arguments:
            self._deltas.append(ArgumentsDelta(self.num_calls - 1, arguments))

    def _end(self) -> bool:
        """The call's object is complete; Hermes' closing tag is taken with it, whole or not at all."""
        scanner = self._scanner
        if scanner is not None:
            self._tell(scanner)
        if self._use.style is ToolStyle.HERMES:
            text = self._buffer.lstrip(BLANKS)
            if HERMES_CLOSE.startswith(text) and text != HERMES_CLOSE:
                return False
            if text.startswith(HERMES_CLOSE):
                self._buffer = text[len(HERMES_CLOSE) :]
        self._scanner = None
        return bool(self._buffer)

    def _give_up(self) -> None:
        """What was read as a call is none."""
        raw, self._raw, self._scanner, self._in_list = self._raw, "", None, False
        if not self._has_begun:
            self._emit_text(raw)
        self._has_begun = False

    def _emit_text(self, text: str) -> None:
        """Blanks at the end wait: they belong to the text that follows, or to nothing."""
        solid = text.rstrip(BLANKS)
        if solid:
            self._deltas.append(TextDelta(self._blanks + solid))
            self._blanks = ""
            self._at_start = False
        self._blanks += text[len(solid) :]


def read_items(text: str, use: ToolUse | None, seed: str) -> list[str | ToolCall]:
    """Text and calls in a whole text; the text alone where there are no tools."""
    if use is None:
        return [text] if text else []
    parser = ToolCallParser(use, seed)
    return gather([*parser.feed(text), *parser.finish()])


def make_parser(use: ToolUse | None, seed: str) -> ToolCallParser | None:
    """A parser for one choice; None where its text is nothing but text."""
    return None if use is None else ToolCallParser(use, seed)


def read_deltas(parser: ToolCallParser | None, event: TokenEvent) -> list[Delta]:
    """What a token adds, and with the last one what was held back."""
    if parser is None:
        return [TextDelta(event.text)] if event.text else []
    deltas = parser.feed(event.text)
    return deltas if event.finish_reason is None else deltas + parser.finish()


def choice_seed(request_id: str, choice: int) -> str:
    """What names a choice of a call, for ids of its calls."""
    return f"{request_id}:{choice}"


def _overlap(text: str, mark: str) -> int:
    """How many of the last characters of ``text`` may be the beginning of ``mark``."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0
