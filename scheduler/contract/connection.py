"""The one way to connect to Redis: retries with back-off on every client, so that a restart is survived."""

from __future__ import annotations

from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff
from redis.exceptions import BusyLoadingError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

RETRIES: Final = 60
BACKOFF_BASE_S: Final = 0.01
BACKOFF_CAP_S: Final = 0.25

#: What a lost or starting server looks like; callers that loop catch these.
CONNECTION_ERRORS: Final = (RedisConnectionError, RedisTimeoutError, BusyLoadingError, OSError)


def connection_options(url: str) -> dict[str, Any]:
    """Keyword arguments for a ``redis.asyncio.Redis`` (or a subclass) that connects to ``url``.

    Retries for about 15 s. ``url`` is ``unix:///path``, ``redis://`` or ``rediss://``; it may name user, password and
    database. Options of the URL that our code does not expect (decoded replies, RESP3, a read limit shorter than
    our blocking reads) are overruled.
    """
    options: dict[str, Any] = dict(parse_url(url))
    options.pop("connection_class", None)
    path = options.pop("path", None)
    if path is not None:
        options["unix_socket_path"] = path
    if url.startswith("rediss://"):
        options["ssl"] = True
    options.pop("socket_timeout", None)
    options.update(
        decode_responses=False,
        protocol=2,
        retry=Retry(EqualJitterBackoff(cap=BACKOFF_CAP_S, base=BACKOFF_BASE_S), RETRIES),
        retry_on_timeout=True,
        retry_on_error=[RedisConnectionError, RedisTimeoutError, BusyLoadingError, OSError],
        lib_name=None,  # no CLIENT SETINFO: two commands less on every connection of a cold start
        lib_version=None,
    )
    return options


def connect(url: str) -> Redis:
    """A client for ``url`` with our retry settings; connects on first use. Replies are bytes. Caller closes it."""
    return Redis(**connection_options(url))
