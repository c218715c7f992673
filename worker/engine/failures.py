"""What goes wrong in an engine, and what a client is told about an exception in its own request."""

from __future__ import annotations

import structlog

from guests.errors import GuestError
from scheduler.contract.errors import ErrorCode, ErrorInfo, GlowplugError
from worker.engine.sampling import SamplingError

_log = structlog.get_logger()


class EngineIntegrityError(Exception):
    """The engine's books do not agree; the message says where."""


def describe_error(error: Exception) -> ErrorInfo:
    """The error that ends a request after ``error``; anything unexpected is logged with its traceback."""
    if isinstance(error, GlowplugError):
        return error.info
    if isinstance(error, GuestError):
        _log.error("guest_failed", error=str(error))
        return ErrorInfo(ErrorCode.GUEST_FAILED, f"the model's guest module failed on this request: {error}")
    if isinstance(error, SamplingError):
        return ErrorInfo(ErrorCode.WORKER_FAILED, str(error))
    if isinstance(error, MemoryError):
        return ErrorInfo(ErrorCode.OUT_OF_MEMORY, "the worker has no memory for this request")
    _log.error("request_failed", exc_info=error)
    return ErrorInfo(ErrorCode.INTERNAL, f"unexpected {type(error).__name__} in the worker")
