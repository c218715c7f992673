"""Reading one tool call's JSON object while it is being written."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

ARGUMENT_KEYS: Final = frozenset({"arguments", "parameters"})
BLANKS: Final = " \t\r\n"


class Phase(Enum):
    """Where in a call's JSON object the scanner stands."""

    OPEN = auto()  # before the brace
    KEY = auto()  # before a key or the closing brace
    KEY_TEXT = auto()
    COLON = auto()
    VALUE = auto()  # before a value
    STRING = auto()
    NESTED = auto()
    SCALAR = auto()
    NEXT = auto()  # after a string or nested value
    DONE = auto()
    FAILED = auto()


@dataclass(slots=True)
class CallScanner:
    """The JSON object of one call, character by character. O(1) each.

    ``name`` and the arguments are handed over in :meth:`take`, the latter while they arrive if the name came first.
    """

    names: frozenset[str]
    phase: Phase = Phase.OPEN
    name: str | None = None
    has_arguments: bool = False
    _arguments: list[str] = field(default_factory=list)  # not handed over yet
    _token: list[str] = field(default_factory=list)  # of a key, or a value that is no nested arguments
    _key: str = ""
    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False

    @property
    def is_call(self) -> bool:
        """Whether it is certain that this is a call of a function that there is."""
        return self.name is not None and self.has_arguments

    def take(self) -> str:
        """Arguments that arrived since the last time."""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def push(self, character: str) -> None:
        """Advance by one character."""
        match self.phase:
            case Phase.STRING | Phase.KEY_TEXT:
                self._push_string(character)
            case Phase.NESTED:
                self._push_nested(character)
            case Phase.SCALAR if character not in ",}" + BLANKS:
                self._token.append(character)
            case Phase.SCALAR:
                self._end_value()
                self.push(character)
            case _ if character in BLANKS:
                pass
            case Phase.OPEN:
                self.phase = Phase.KEY if character == "{" else Phase.FAILED
            case Phase.KEY if character == '"':
                self._token, self.phase = ['"'], Phase.KEY_TEXT
            case Phase.COLON if character == ":":
                self.phase = Phase.VALUE
            case Phase.VALUE:
                self._begin_value(character)
            case Phase.NEXT if character == ",":
                self.phase = Phase.KEY
            case Phase.NEXT if character == "}":
                self._end_object()
            case _:
                self.phase = Phase.FAILED

    def _begin_value(self, character: str) -> None:
        self._token = [character]
        if character == '"':
            self.phase = Phase.STRING
        elif character in "{[":
            self.phase, self._depth = Phase.NESTED, 1
            self._in_string = self._escaped = False
            if self._key in ARGUMENT_KEYS:
                self.has_arguments = True
                self._arguments.append(character)
        else:
            self.phase = Phase.SCALAR

    def _push_string(self, character: str) -> None:
        self._token.append(character)
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            if self.phase is Phase.KEY_TEXT:
                self._key = _decode_string("".join(self._token)) or ""
                self.phase = Phase.COLON
            else:
                self._end_value()

    def _push_nested(self, character: str) -> None:
        if self._key in ARGUMENT_KEYS:
            self._arguments.append(character)
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 0:
                self.phase = Phase.NEXT

    def _end_value(self) -> None:
        text, self.phase = "".join(self._token), Phase.NEXT
        if self._key == "name":
            self.name = _decode_string(text)
            if self.name not in self.names:
                self.phase = Phase.FAILED
        elif self._key in ARGUMENT_KEYS:
            # A model that writes its arguments as a string of JSON, or null for none.
            self.has_arguments = True
            self._arguments.append(_decode_string(text) or "{}")

    def _end_object(self) -> None:
        self.phase = Phase.DONE if self.is_call else Phase.FAILED


def _decode_string(text: str) -> str | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, str) else None
