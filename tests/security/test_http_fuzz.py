"""Raw HTTP that is wrong in every way chance can think of: no 500, no hang, and others are served."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.fuzz_http import LIMITS, run_cases
from tests.gateway_fixtures import chat_body, run_gateway

CASES = 1000


async def test_threat_malformed_http(redis_url: str, tmp_path: Path) -> None:
    """Seeded inputs over a socket; afterwards the gateway holds no body and serves. Longer: tests.fuzz.fuzz_http."""
    async with run_gateway(redis_url, tmp_path, **LIMITS) as gateway:
        outcome = await run_cases(gateway, cases=CASES, seed=1)
        print(outcome)
        assert outcome.failures == []
        assert outcome.cases == CASES
        assert {200, 400, 404, 405} <= set(outcome.statuses)
        assert gateway.server.gateway.bodies_bytes == 0
        assert (await gateway.post("/v1/chat/completions", chat_body()))[0] == 200
