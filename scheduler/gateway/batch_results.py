"""What a batch has answered: a file for each of its runs, put together in the end, each line once and in order.

A run appends to ``BATCH.RUN.part``, which it alone writes. A run that lost its lease without knowing goes on writing to
its own file, where it harms nobody: what counts for a line is its first answer in the run with the lowest number, read
when the output is put together. A line torn by a crash has no end and is not an answer; it is run again.

Every method blocks.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from scheduler.contract.errors import ErrorInfo
from scheduler.gateway.batch_records import LineError
from scheduler.gateway.errors import ErrorBody, ErrorDetail
from scheduler.gateway.file_store import disk_error

_SUFFIX: Final = ".part"
_FIRST_ERROR_STATUS: Final = 400


class LineResponse(msgspec.Struct):
    """The HTTP answer that the line would have got."""

    status_code: int
    request_id: str
    body: Any


class ResultRow(msgspec.Struct):
    """A line of an output or error file. Source: openai-openapi, schema BatchRequestOutput."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineError | None


class _Answer(msgspec.Struct):
    """A line of a run's own file."""

    line: int
    ok: bool
    row: msgspec.Raw


def build_success(custom_id: str, request_id: str, body: bytes) -> ResultRow:
    """The row of a line that was answered with ``body``."""
    return ResultRow(_create_row_id(), custom_id, LineResponse(200, request_id, msgspec.Raw(body)), None)


def build_failure(custom_id: str, request_id: str, error: ErrorInfo, line: int) -> ResultRow:
    """The row of a line that was refused or failed, with the answer that a client alone would have got."""
    disposition = error.disposition
    body = ErrorBody(ErrorDetail(error.message, disposition.openai_type, error.param, error.code.value))
    response = LineResponse(max(_FIRST_ERROR_STATUS, disposition.status), request_id, body)
    return ResultRow(
        _create_row_id(), custom_id, response, LineError(error.code.value, error.message, line, error.param)
    )


def build_unanswered(custom_id: str, code: str, message: str, line: int) -> ResultRow:
    """The row of a line that was never run."""
    return ResultRow(_create_row_id(), custom_id, None, LineError(code, message, line))


def encode_row(row: ResultRow) -> bytes:
    """The row as a line of a file."""
    return msgspec.json.encode(row) + b"\n"


def _create_row_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"


class RunFile:
    """The answers of one run. Owned by that run; ``close`` when it ends."""

    def __init__(self, folder: Path, batch_id: str, run: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = folder / f"{batch_id}.{run:012d}{_SUFFIX}"
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        except OSError as error:
            raise disk_error(error, "beginning a batch's results") from error
        self._size_bytes = 0

    def append(self, rows: list[tuple[int, bool, ResultRow]]) -> None:
        """Add line number, success and row of each. On failure nothing is added.

        Raises:
            GlowplugError: the disk is full or fails.
        """
        data = b"".join(
            msgspec.json.encode(_Answer(line, ok, msgspec.Raw(msgspec.json.encode(row)))) + b"\n"
            for line, ok, row in rows
        )
        try:
            written = os.write(self._fd, data)
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError as error:
            os.ftruncate(self._fd, self._size_bytes)
            raise disk_error(error, "writing a batch's results") from error
        self._size_bytes += len(data)

    def sync(self) -> None:
        """Have what was added survive a power cut.

        Raises:
            OSError: the disk fails.
        """
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    offset: int
    num_bytes: int
    ok: bool


class Answers:
    """Where the answer to each line is, over all runs of a batch up to now."""

    def __init__(self, folder: Path, batch_id: str) -> None:
        self._places: dict[int, _Place] = {}
        self.paths = sorted(folder.glob(f"{batch_id}.*{_SUFFIX}"))
        for path in self.paths:
            self._read(path)
        self.num_completed = sum(place.ok for place in self._places.values())
        self.num_failed = len(self._places) - self.num_completed

    def __contains__(self, line: object) -> bool:
        return line in self._places

    def _read(self, path: Path) -> None:
        offset = 0
        with open(path, "rb") as file:
            for data in file:
                if data.endswith(b"\n"):
                    try:
                        answer = msgspec.json.decode(data, type=_Answer)
                    except msgspec.MsgspecError:  # torn by a power cut in the middle of the file
                        answer = None
                    if answer is not None:
                        self._places.setdefault(answer.line, _Place(path, offset, len(data), answer.ok))
                offset += len(data)

    def read_rows(self, *, ok: bool) -> Iterator[tuple[int, bytes]]:
        """Line number and row, ready for a file, of all lines that succeeded (or failed), in order."""
        files = {path: open(path, "rb") for path in self.paths}  # noqa: SIM115  (closed below)
        try:
            for line in sorted(self._places):
                place = self._places[line]
                if place.ok is ok:
                    file = files[place.path]
                    file.seek(place.offset)
                    answer = msgspec.json.decode(file.read(place.num_bytes), type=_Answer)
                    yield line, bytes(answer.row) + b"\n"
        finally:
            for file in files.values():
                file.close()

    def drop(self) -> None:
        """Delete the runs' files: the output is whole."""
        for path in self.paths:
            path.unlink(missing_ok=True)
