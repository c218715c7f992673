"""Who asks: what a key (or the lack of one, where that is allowed) entitles a request to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aiohttp import web

from scheduler.api_keys import ApiKey


@dataclass(frozen=True, slots=True)
class Identity:
    """Who sent a request. ``key`` None: nobody has to say, on a gateway that only this machine can reach."""

    key: ApiKey | None = None

    @property
    def tenant(self) -> str:
        """Whose share, quota and cache partition the request belongs to; empty without keys."""
        return "" if self.key is None else self.key.tenant

    @property
    def key_id(self) -> str:
        """What may be logged of the key; empty without keys."""
        return "" if self.key is None else self.key.id

    def may_see(self, model: str) -> bool:
        """Whether ``model`` exists for who asks; what does not is answered like an unknown name."""
        return self.key is None or self.key.may_see(model)


ANONYMOUS: Final = Identity()
IDENTITY: Final = web.RequestKey("identity", Identity)
