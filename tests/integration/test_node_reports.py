"""Heartbeats of node agents in Redis: registered or not, and two agents that took one name for theirs."""

from __future__ import annotations

import time

from structlog.testing import capture_logs

from scheduler.contract.connection import connect
from scheduler.contract.messages import NodeReport
from worker.reports import Reports


async def test_two_agents_of_one_name_on_two_hosts_are_told(redis_url: str) -> None:
    """Each sees at its next heartbeat that another wrote in between. An earlier agent's last report says nothing."""
    redis = connect(redis_url)
    beats = iter(range(1, 100))

    async def beat(reports: Reports) -> bool:
        return await reports.node_alive(NodeReport("vm", next(beats), time.time(), 1, 1, {}))

    try:
        earlier, one, other = (Reports(redis, "vm") for _ in range(3))
        with capture_logs() as logs:
            assert [await beat(earlier), await beat(earlier), await beat(one), await beat(one)] == [False, *[True] * 3]
        assert logs == []
        with capture_logs() as logs:
            assert [await beat(other), await beat(one), await beat(other)] == [True] * 3
        assert [(line["event"], line["node_id"]) for line in logs] == [("two_agents_of_one_name", "vm")] * 2
        assert all("GLOWPLUG_NODE_ID" in line["remedy"] for line in logs)
    finally:
        await redis.aclose()
