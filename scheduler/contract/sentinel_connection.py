"""Connections to a master that sentinels name: who it is gets asked anew for each try, not once for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection
from redis.backoff import NoBackoff

if TYPE_CHECKING:
    _Base = SentinelManagedConnection
else:
    _Base = object


class _OneTryEach(_Base):
    """redis-py retries an address as often as the whole: a dead master is tried for 11 s after its replica has taken
    over. Here an address gets one try, and the retries around it ask the sentinels again."""

    async def connect_to(self, address: tuple[str, int]) -> None:
        """Connect to what the sentinels just named.

        Raises:
            redis.exceptions.ConnectionError: nobody answers there now.
        """
        parent: Any = super()  # redis-py leaves it untyped
        retry = self.retry
        self.retry = Retry(NoBackoff(), 0)
        try:
            await parent.connect_to(address)
        finally:
            self.retry = retry


class MasterConnection(_OneTryEach, SentinelManagedConnection):
    """One to the present master."""


class MasterSSLConnection(_OneTryEach, SentinelManagedSSLConnection):
    """The same over TLS."""
