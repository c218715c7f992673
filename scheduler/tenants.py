"""What a tenant may use: its share against others, and its quotas."""

from __future__ import annotations

import msgspec


class TenantPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one tenant, over all its keys and all gateways. 0: unlimited.

    ``weight`` is its share of a busy model against other tenants'. ``concurrency`` counts calls that run or wait.
    """

    weight: float = 1.0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0  # prompt and completion
    concurrency: int = 0

    @property
    def has_quota(self) -> bool:
        """Whether anything is limited, so that Redis must be asked."""
        return bool(self.requests_per_minute or self.tokens_per_minute or self.concurrency)


UNLIMITED = TenantPolicy()
