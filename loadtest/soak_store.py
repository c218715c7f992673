"""What the queue's server keeps, by kind of key: how much now, and how much when as many leave as come."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis

MIB: Final = 1024 * 1024
SAMPLE_KEYS: Final = 200
#: Kinds with fewer keys belong to the server's parts, not to requests.
LEAST_KEYS: Final = 20
#: Kinds of which only the newest are kept, whatever their TTL.
MOST_KEPT: Final = {"gp:trace": 10_000}


@dataclass(frozen=True, slots=True)
class KeyKind:
    """Keys with one prefix. ``ttl_s``: the longest that one of them has left; None: one of them has none."""

    name: str
    count: int
    bytes_each: float
    ttl_s: float | None

    def bound_mib(self, rate_per_s: float) -> float | None:
        """What they come to if ``rate_per_s`` requests a second go on for ever, one key each; None: without end."""
        if self.ttl_s is None:
            return None
        most = min(rate_per_s * self.ttl_s, MOST_KEPT.get(self.name, float("inf")))
        return max(most, self.count) * self.bytes_each / MIB


def read_store(socket: Path) -> list[KeyKind]:
    """The kinds that grow with requests, largest first. Blocks; asks for size and TTL of some keys of each kind."""
    kinds: dict[str, list[bytes]] = {}
    with redis.Redis(unix_socket_path=str(socket)) as client:
        for key in client.scan_iter(count=1000):
            kinds.setdefault(key.decode("utf-8", "replace").rpartition(":")[0], []).append(key)
        found = [_measure(client, name, keys) for name, keys in kinds.items() if len(keys) >= LEAST_KEYS]
    return sorted(found, key=lambda kind: -kind.count * kind.bytes_each)


def _measure(client: Any, name: str, keys: list[bytes]) -> KeyKind:
    some = list(itertools.islice(keys, 0, None, max(1, len(keys) // SAMPLE_KEYS)))
    pipeline = client.pipeline(transaction=False)
    for key in some:
        pipeline.memory_usage(key)
        pipeline.ttl(key)
    replies = pipeline.execute()
    sizes = [size for size in replies[::2] if size is not None]
    ttls_s = [ttl_s for ttl_s in replies[1::2] if ttl_s != -2]  # -2: it went meanwhile
    has_end = all(ttl_s >= 0 for ttl_s in ttls_s)
    return KeyKind(name, len(keys), sum(sizes) / max(1, len(sizes)), max(ttls_s, default=0) if has_end else None)


def describe_store(kinds: list[KeyKind], rate_per_s: float) -> list[str]:
    """Lines for people."""
    lines = [f"the queue's server keeps, and comes to at {rate_per_s:.2f} requests/s"]
    for kind in kinds:
        bound_mib = kind.bound_mib(rate_per_s)
        ends = "no TTL: WITHOUT END" if bound_mib is None else f"{kind.ttl_s:>5} s, at most {bound_mib:6.2f} MiB"
        now_mib = kind.count * kind.bytes_each / MIB
        lines.append(f"  {kind.name:<16} {kind.count:>6} of {kind.bytes_each:>6.0f} B = {now_mib:6.2f} MiB; {ends}")
    return lines
