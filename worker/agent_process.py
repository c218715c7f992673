"""The process of a node agent: from settings and keys to a running agent, and its signals."""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop

from scheduler.contract.config_file import find_changed
from scheduler.contract.connection import connect
from scheduler.contract.environment import EXIT_SETTINGS, SettingsError
from scheduler.contract.reloading import AGENT, ReloadListener
from scheduler.contract.telemetry import configure_logging
from snapshots.errors import KeyRingError
from snapshots.keyring import KeyRing
from worker.agent import NodeAgent
from worker.agent_settings import AgentSettings, load_keyring, read_agent_settings
from worker.reports import read_memory_total_bytes
from worker.zygote_process import ZygoteProcess


async def run_agent(settings: AgentSettings, keyring: KeyRing, zygote: ZygoteProcess | None = None) -> None:
    """Run a node agent until SIGTERM or SIGINT; a second signal ends it without draining."""
    redis = connect(settings.process.redis_url)
    agent = NodeAgent(settings, keyring, redis, zygote)

    async def reload() -> tuple[str, ...]:
        needs_restart = await _check_config()
        agent.accept_gpu_errors()
        return needs_restart

    reloading = ReloadListener(redis, AGENT, settings.process.node_id, reload)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.stop)
    loop.add_signal_handler(signal.SIGHUP, reloading.reload_in_background)
    reloading.start()
    try:
        await agent.run()
    finally:
        await reloading.aclose()
        await redis.aclose()


async def _check_config() -> tuple[str, ...]:
    """All that an agent has of the file holds from its start on: whether the file is right, and what a restart changes.

    Raises:
        SettingsError: it is not.
    """
    return await asyncio.to_thread(find_changed, ("agent", "logging"))


def main(zygote: ZygoteProcess | None = None) -> int:
    """Entry point of ``python -m worker agent``; exit code. Takes over ``zygote``, if one was started already."""
    try:
        settings = read_agent_settings(read_memory_total_bytes())
        configure_logging(
            component="agent",
            level=settings.process.log_level,
            log_format=settings.process.log_format,
            log_dir=settings.process.log_dir,
        )
        uvloop.run(run_agent(settings, load_keyring(settings.process.state_dir), zygote))
    except (SettingsError, KeyRingError) as error:
        print(f"glowplug agent: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    return 0
