"""The one way to connect to Redis: retries with back-off on every client, so that a restart is survived."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff
from redis.exceptions import BusyLoadingError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from scheduler.contract.environment import REDIS_URL, SettingsError

RETRIES: Final = 60
BACKOFF_BASE_S: Final = 0.01
BACKOFF_CAP_S: Final = 0.25
SENTINEL_SCHEME: Final = "+sentinel://"
SENTINEL_TIMEOUT_S: Final = 1.0

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
    """A client for ``url`` with our retry settings; connects on first use. Replies are bytes. Caller closes it.

    ``redis+sentinel://[user:password@]host:port,host:port/service[/db]`` asks those sentinels, one after the other, for
    the service's present master, at each new connection (``rediss+sentinel``: TLS to the master). User and password are
    the master's; ``?sentinel_username=`` and ``?sentinel_password=`` are the sentinels'.

    Raises:
        SettingsError: not such a URL. The message has none of it: it may hold a password.
    """
    try:
        return _connect_by_sentinel(url) if SENTINEL_SCHEME in url else Redis(**connection_options(url))
    except (ValueError, TypeError) as error:  # TypeError: an option that no connection has
        scheme = url.partition("://")[0]
        form = {"unix": "/PATH/TO.SOCK[?db=N]"}.get(scheme, "[USER:PASSWORD@]HOST:PORT[/DB]")
        if SENTINEL_SCHEME in url:
            form = "[USER:PASSWORD@]HOST:PORT[,HOST:PORT]/SERVICE[/DB]"
        raise SettingsError(
            f"{REDIS_URL} begins with {scheme}:// and cannot be used: expected {scheme}://{form}, ports up to 65535, "
            "no ?option= that redis-py has not, and %2F %3A %40 %23 in a password for / : @ #"
        ) from error


def _connect_by_sentinel(url: str) -> Redis:
    from redis.asyncio.sentinel import Sentinel  # only who uses it pays for these imports

    from scheduler.contract.sentinel_connection import MasterConnection, MasterSSLConnection

    scheme, _, rest = url.partition(SENTINEL_SCHEME)
    authority, _, path = rest.partition("/")
    path, _, query = path.partition("?")
    credentials, _, hosts = authority.rpartition("@")
    service, _, database = path.partition("/")
    addresses = [(host.rpartition(":")[0], host.rpartition(":")[2]) for host in hosts.split(",")]
    if not service or not all(host and port.isdigit() for host, port in addresses):
        raise ValueError(f"{scheme}{SENTINEL_SCHEME}...: expected host:port[,host:port]/service after it")
    given = dict(parse_qsl(query))
    own = {name: given.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in given}
    at = f"{credentials}@" if credentials else ""
    options = connection_options(f"{scheme}://{at}master:1/{database or 0}?{urlencode(given)}")
    for name in ("host", "port"):
        options.pop(name, None)
    make_sentinel: Any = Sentinel  # redis-py leaves it untyped
    sentinel = make_sentinel(
        [(host.strip("[]"), int(port)) for host, port in addresses],
        sentinel_kwargs={"socket_timeout": SENTINEL_TIMEOUT_S, **own},
    )
    connection_class = MasterSSLConnection if options.get("ssl") else MasterConnection
    client: Redis = sentinel.master_for(service, connection_class=connection_class, **options)
    return client
