"""The audit log: one JSON line for each administrative act, appended, never rewritten: who, what, when, outcome.

Separate from the log on stderr, so that it can be kept longer and given to other readers. A line is one ``write`` to
a file opened for appending, so writers of several processes do not mix.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, Final

import structlog

#: Path of the audit log, instead of the one in the state folder; ``-`` for stderr.
AUDIT_LOG: Final = "GLOWPLUG_AUDIT_LOG"

_log = structlog.get_logger()


class AuditLog:
    """An open audit log. Each line is at most a few hundred bytes; writes go to the page cache."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._log = structlog.wrap_logger(
            structlog.BytesLogger(file),
            processors=[
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(serializer=_encode_line),
            ],
            wrapper_class=structlog.BoundLogger,
        )

    def write(self, actor: str, act: str, **facts: Any) -> None:
        """Append one line. ``actor``: id of an API key, ``command-line`` or ``loopback``; never a secret.

        A full disk must not stop serving: it is an error in the log on stderr.
        """
        try:
            self._log.msg(act, actor=actor, **facts)
        except OSError as error:
            _log.error("audit_line_lost", act=act, actor=actor, error=str(error))

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()


def open_audit_log(state_dir: Path) -> AuditLog:
    """The audit log of ``state_dir``, mode 0600, made if need be.

    Raises:
        OSError: it cannot be opened.
    """
    named = os.environ.get(AUDIT_LOG)
    if named == "-":
        return AuditLog(open(os.dup(2), "ab", buffering=0))
    path = Path(named) if named else state_dir / "log" / "audit.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    return AuditLog(open(os.open(path, flags, 0o600), "ab", buffering=0))


def audit_to_file(state_dir: Path, actor: str, act: str, **facts: Any) -> None:
    """Append one line and close: for commands."""
    try:
        audit = open_audit_log(state_dir)
    except OSError as error:
        _log.error("audit_line_lost", act=act, actor=actor, error=str(error))
        return
    audit.write(actor, act, **facts)
    audit.close()


def _encode_line(event: dict[str, Any], **_: Any) -> bytes:
    import msgspec

    return msgspec.json.encode(event)
