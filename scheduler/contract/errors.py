"""Error codes that cross a process border, each with its HTTP status and OpenAI error type."""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

import msgspec


class ErrorCode(StrEnum):
    """Machine-readable cause; the ``code`` field of an OpenAI-shaped error body."""

    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    REQUEST_TOO_LARGE = "request_too_large"
    MODEL_NOT_FOUND = "model_not_found"
    SNAPSHOT_SIGNATURE_INVALID = "snapshot_signature_invalid"
    SNAPSHOT_CORRUPT = "snapshot_corrupt"
    SNAPSHOT_INCOMPATIBLE = "snapshot_incompatible"
    QUEUE_FULL = "queue_full"
    OUT_OF_MEMORY = "out_of_memory"
    WAKE_FAILED = "wake_failed"
    WAKE_TIMEOUT = "wake_timeout"
    OVERLOADED = "overloaded"
    GUEST_FAILED = "guest_failed"
    WORKER_FAILED = "worker_failed"
    BACKEND_UNAVAILABLE = "backend_unavailable"
    CANCELLED = "cancelled"
    INTERNAL = "internal_error"


class Disposition(NamedTuple):
    """How an error code is shown to an HTTP client."""

    status: int
    openai_type: str


DISPOSITIONS: Final[dict[ErrorCode, Disposition]] = {
    ErrorCode.INVALID_REQUEST: Disposition(400, "invalid_request_error"),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: Disposition(400, "invalid_request_error"),
    ErrorCode.REQUEST_TOO_LARGE: Disposition(413, "invalid_request_error"),
    ErrorCode.MODEL_NOT_FOUND: Disposition(404, "invalid_request_error"),
    ErrorCode.SNAPSHOT_SIGNATURE_INVALID: Disposition(403, "permission_error"),
    ErrorCode.SNAPSHOT_CORRUPT: Disposition(500, "server_error"),
    ErrorCode.SNAPSHOT_INCOMPATIBLE: Disposition(500, "server_error"),
    ErrorCode.QUEUE_FULL: Disposition(429, "rate_limit_error"),
    ErrorCode.OUT_OF_MEMORY: Disposition(503, "server_error"),
    ErrorCode.WAKE_FAILED: Disposition(503, "server_error"),
    ErrorCode.WAKE_TIMEOUT: Disposition(503, "server_error"),
    ErrorCode.OVERLOADED: Disposition(503, "server_error"),
    ErrorCode.GUEST_FAILED: Disposition(500, "server_error"),
    ErrorCode.WORKER_FAILED: Disposition(500, "server_error"),
    ErrorCode.BACKEND_UNAVAILABLE: Disposition(503, "server_error"),
    ErrorCode.CANCELLED: Disposition(499, "server_error"),
    ErrorCode.INTERNAL: Disposition(500, "server_error"),
}


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as it travels in a terminal frame or a model card.

    ``message`` says what went wrong, the limit, what was seen and the remedy. ``param`` names the request
    field at fault, if one is. ``retry_after_s`` is set where trying again can help.
    """

    code: ErrorCode
    message: str
    param: str | None = None
    retry_after_s: int | None = None

    @property
    def disposition(self) -> Disposition:
        return DISPOSITIONS[self.code]


class GlowplugError(Exception):
    """An error that has an :class:`ErrorInfo` for whoever asked."""

    def __init__(
        self, code: ErrorCode, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.info = ErrorInfo(code, message, param, retry_after_s)


class ContractError(Exception):
    """Bytes from another process that do not decode, or exceed their cap."""
