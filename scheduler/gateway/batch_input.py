"""Input files of batches: JSON lines, checked as a whole before anything runs, then read line by line.

Source of the line's shape: the openai-openapi specification, schema BatchRequestInput. Everything here blocks.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from scheduler.gateway.batch_records import LineError
from scheduler.gateway.request_body import MAX_JSON_DEPTH, is_deeper

MAX_LINE_BYTES: Final = 4 * 1024 * 1024
MAX_CUSTOM_ID_CHARS: Final = 512
MAX_ERRORS: Final = 50  # that are told; a file with one wrong line often has many


class BatchLine(msgspec.Struct, frozen=True):
    """One request of a batch."""

    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class InputFacts:
    """What a whole input file holds. ``errors`` empty: every line has the right form."""

    num_requests: int
    model: str
    errors: tuple[LineError, ...]


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers (from 1) and lines that are not blank; of a line that is too long, only its beginning.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            begin = line
            while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
                pass  # the rest of a line that is refused
            if begin.strip():
                yield number, begin


def check_input(path: Path, endpoint: str, max_lines: int) -> InputFacts:
    """Check every line: JSON, a custom_id of its own, this endpoint, one model in the whole file of ``max_lines``.

    Raises:
        OSError: the file cannot be read.
    """
    errors: list[LineError] = []
    seen: set[str] = set()
    model, num_requests = "", 0
    for number, data in read_lines(path):
        num_requests += 1
        if num_requests > max_lines:
            message = f"more than {max_lines} requests: split the file"
            errors.append(LineError("too_many_requests", message, number))
            break
        found = _check_line(number, data, endpoint, seen, model)
        if isinstance(found, LineError):
            errors.append(found)
            if len(errors) >= MAX_ERRORS:
                break
        else:
            model = model or found
    if num_requests == 0:
        errors.append(LineError("empty_file", "the input file has no requests: one JSON object a line"))
    return InputFacts(num_requests, model, tuple(errors))


def _check_line(number: int, data: bytes, endpoint: str, seen: set[str], model: str) -> LineError | str:
    """What is wrong with a line, else its model."""
    if len(data) > MAX_LINE_BYTES:
        return LineError("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes", number)
    try:
        line = parse_line(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        message = f'expected {{"custom_id", "method", "url", "body"}} as one JSON object: {error}'
        return LineError("invalid_json_line", message, number)
    if not 0 < len(line.custom_id) <= MAX_CUSTOM_ID_CHARS:
        message = f"{len(line.custom_id)} characters; expected 1 to {MAX_CUSTOM_ID_CHARS}"
        return LineError("invalid_custom_id", message, number, "custom_id")
    if line.custom_id in seen:
        message = f'"{line.custom_id[:80]}" is used before in this file: each line needs one of its own'
        return LineError("duplicate_custom_id", message, number, "custom_id")
    seen.add(line.custom_id)
    if line.method != "POST":
        return LineError("invalid_method", f'expected "POST", got "{line.method[:20]}"', number, "method")
    if line.url != endpoint:
        message = f'the batch is for {endpoint}, this line for "{line.url[:80]}"'
        return LineError("mismatched_url", message, number, "url")
    return _check_body(number, line.body, model)


def _check_body(number: int, body: dict[str, Any], model: str) -> LineError | str:
    own = body.get("model")
    if not isinstance(own, str) or not own:
        return LineError("invalid_model", "is required, as a string", number, "body.model")
    if model and own != model:
        message = f'"{own[:80]}" after "{model[:80]}": a batch is for one model; make a batch for each'
        return LineError("mismatched_model", message, number, "body.model")
    if body.get("stream"):
        return LineError("invalid_request", "a line of a batch is not streamed: leave it out", number, "body.stream")
    if is_deeper(body, MAX_JSON_DEPTH):
        return LineError("invalid_json_line", f"nested more than {MAX_JSON_DEPTH} levels deep", number, "body")
    return own


def parse_line(data: bytes) -> BatchLine:
    """The request in a line.

    Raises:
        MsgspecError: it is none; also UnicodeDecodeError and RecursionError.
    """
    return _decoder.decode(data)


_decoder: Final = msgspec.json.Decoder(BatchLine)


class UnansweredLines:
    """The lines of an input file that ``answered`` lacks, in their order, a few at a time. Owns the open file."""

    def __init__(self, path: Path, answered: Container[int]) -> None:
        self._lines = (line for line in read_lines(path) if line[0] not in answered)

    def read_some(self, count: int) -> list[tuple[int, BatchLine]]:
        """At most ``count`` lines; empty at the end.

        Raises:
            OSError: the file cannot be read.
        """
        found = []
        for number, data in self._lines:
            found.append((number, parse_line(data)))
            if len(found) >= count:
                break
        return found
