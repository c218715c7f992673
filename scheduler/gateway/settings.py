"""Settings of the gateway process, read once from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from scheduler.contract.environment import SettingsError, read_positive_float
from scheduler.gateway.tracing_settings import TracingSettings, read_tracing_settings

HOST: Final = "GLOWPLUG_HOST"
PORT: Final = "GLOWPLUG_PORT"
READY_FD: Final = "GLOWPLUG_READY_FD"
ADMIN: Final = "GLOWPLUG_ADMIN"
REQUEST_LIMIT_S: Final = "GLOWPLUG_REQUEST_LIMIT_S"
COLD_START_LIMIT_S: Final = "GLOWPLUG_COLD_START_LIMIT_S"
DRAIN_GRACE_S: Final = "GLOWPLUG_GATEWAY_DRAIN_GRACE_S"
NO_AUTH: Final = "GLOWPLUG_NO_AUTH"
TLS_CERT: Final = "GLOWPLUG_TLS_CERT"
TLS_KEY: Final = "GLOWPLUG_TLS_KEY"
CORS_ORIGINS: Final = "GLOWPLUG_CORS_ORIGINS"  # comma-separated, e.g. https://app.example.com
MAX_BODY_BYTES: Final = "GLOWPLUG_MAX_BODY_BYTES"
FILES_DIR: Final = "GLOWPLUG_FILES_DIR"
MAX_FILE_BYTES: Final = "GLOWPLUG_MAX_FILE_BYTES"
MAX_TENANT_FILE_BYTES: Final = "GLOWPLUG_MAX_TENANT_FILE_BYTES"
MAX_TENANT_FILES: Final = "GLOWPLUG_MAX_TENANT_FILES"
FILE_RETENTION_S: Final = "GLOWPLUG_FILE_RETENTION_S"
UPLOAD_LIMIT_S: Final = "GLOWPLUG_UPLOAD_LIMIT_S"
MAX_BATCHES: Final = "GLOWPLUG_MAX_BATCHES"
MAX_TENANT_BATCHES: Final = "GLOWPLUG_MAX_TENANT_BATCHES"
MAX_BATCH_LINES: Final = "GLOWPLUG_MAX_BATCH_LINES"
BATCHES_AT_ONCE: Final = "GLOWPLUG_BATCHES_AT_ONCE"

MIB: Final = 1024 * 1024
DAY_S: Final = 86_400
MIN_FILE_RETENTION_S: Final = 3600
LARGEST: Final = 1 << 50  # of counts and bytes: a value beyond is a slip


class GatewaySettings(msgspec.Struct, frozen=True):
    """How the gateway listens and what it bounds.

    ``ready_fd`` is an inherited descriptor that gets one JSON line ``{"host", "port"}`` once the listener accepts.
    ``request_limit_s`` bounds a request that is not streamed, and the silence within one that is.
    ``cold_start_limit_s`` bounds the wait for a first token while the model is not hot. ``redis_limit_s``
    bounds each wait for Redis, ``body_limit_s`` the wait for a request's body. Limits of files and batches are the
    same for every tenant; how batches of a model run is in its policy.
    """

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any free port
    ready_fd: int | None = None
    admin_from_anywhere: bool = False
    request_limit_s: float = 600.0
    cold_start_limit_s: float = 120.0
    wake_comment_every_s: float = 0.9  # promised: at least one a second
    silent_comment_every_s: float = 5.0  # in the middle of a stream, when its worker died and is replaced
    drain_grace_s: float = 30.0
    redis_limit_s: float = 5.0
    max_queued: int = 512  # requests of a model queued or running; a model's own policy wins
    max_wait_s: float = 120.0  # a request that would wait longer for its turn is refused; likewise
    body_limit_s: float = 60.0
    max_body_bytes: int = 8 * MIB
    max_write_buffer_bytes: int = MIB
    backlog: int = 4096
    no_auth: bool = False  # asked for; on loopback only
    tls_certificate: Path | None = None  # PEM files; both or none
    tls_key: Path | None = None
    cors_origins: tuple[str, ...] = ()
    header_limit_s: float = 20.0  # from a connection to its first whole header
    keepalive_s: float = 75.0  # from an answer to the next whole header
    write_limit_s: float = 30.0  # for a client to take what was written to it
    stream_limit_s: float = 3600.0  # a whole stream
    max_connections: int = 20_000
    max_bodies_bytes: int = 512 * MIB  # bodies being read, of all clients together
    files_dir: Path | None = None  # of uploaded files and batch results; None: "files" in the state folder
    max_file_bytes: int = 200 * MIB
    max_tenant_file_bytes: int = 2048 * MIB
    max_tenant_files: int = 1_000
    file_retention_s: int = 30 * DAY_S  # after it, uploads and results are deleted
    upload_limit_s: float = 900.0  # from an upload's header to its last byte
    tracing: TracingSettings | None = None
    max_batches: int = 1_000  # under way, of all tenants
    max_tenant_batches: int = 50  # likewise of one
    max_batch_lines: int = 50_000
    batches_at_once: int = 4  # that this gateway runs; the others wait for their turn


def read_gateway_settings(env: Mapping[str, str] = os.environ) -> GatewaySettings:
    """The gateway's settings.

    Raises:
        SettingsError: a variable is malformed, or asks for what is not installed; the message names it.
    """
    defaults = GatewaySettings()
    ready_fd = env.get(READY_FD)
    certificate, key = _read_tls(env)
    return GatewaySettings(
        host=env.get(HOST) or defaults.host,
        port=_read_integer(PORT, env.get(PORT), defaults.port, high=65535),
        ready_fd=None if not ready_fd else _read_integer(READY_FD, ready_fd, 0, high=1_000_000),
        admin_from_anywhere=env.get(ADMIN) == "1",
        request_limit_s=read_positive_float(REQUEST_LIMIT_S, defaults.request_limit_s, env),
        cold_start_limit_s=read_positive_float(COLD_START_LIMIT_S, defaults.cold_start_limit_s, env),
        drain_grace_s=read_positive_float(DRAIN_GRACE_S, defaults.drain_grace_s, env),
        max_body_bytes=int(read_positive_float(MAX_BODY_BYTES, defaults.max_body_bytes, env)),
        files_dir=Path(folder).expanduser().absolute() if (folder := env.get(FILES_DIR)) else None,
        upload_limit_s=read_positive_float(UPLOAD_LIMIT_S, defaults.upload_limit_s, env),
        **_read_batch_limits(env, defaults),
        no_auth=env.get(NO_AUTH) == "1",
        tls_certificate=certificate,
        tls_key=key,
        tracing=read_tracing_settings(env),
        cors_origins=tuple(origin.strip() for origin in (env.get(CORS_ORIGINS) or "").split(",") if origin.strip()),
    )


def _read_batch_limits(env: Mapping[str, str], defaults: GatewaySettings) -> dict[str, int]:
    """The whole numbers that bound files and batches, by field."""
    found = {}
    for name, field, low in (
        (MAX_FILE_BYTES, "max_file_bytes", 1),
        (MAX_TENANT_FILE_BYTES, "max_tenant_file_bytes", 1),
        (MAX_TENANT_FILES, "max_tenant_files", 1),
        (FILE_RETENTION_S, "file_retention_s", MIN_FILE_RETENTION_S),
        (MAX_BATCHES, "max_batches", 1),
        (MAX_TENANT_BATCHES, "max_tenant_batches", 1),
        (MAX_BATCH_LINES, "max_batch_lines", 1),
        (BATCHES_AT_ONCE, "batches_at_once", 1),
    ):
        found[field] = _read_integer(name, env.get(name), getattr(defaults, field), low=low, high=LARGEST)
    return found


def _read_tls(env: Mapping[str, str]) -> tuple[Path | None, Path | None]:
    certificate, key = env.get(TLS_CERT), env.get(TLS_KEY)
    if bool(certificate) != bool(key):
        missing = TLS_KEY if certificate else TLS_CERT
        raise SettingsError(f"TLS needs a certificate and its key, as PEM files: {missing} is not set")
    return (Path(certificate), Path(key)) if certificate and key else (None, None)


def _read_integer(name: str, text: str | None, default: int, *, low: int = 0, high: int) -> int:
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and low <= int(text) <= high):
        raise SettingsError(f'{name}="{text[:40]}": expected a whole number from {low} to {high}, e.g. {default}')
    return int(text)
