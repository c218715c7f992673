"""The process of a node agent: from settings and keys to a running agent, and its signals."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import structlog
import uvloop

from scheduler.contract.config_file import find_changed
from scheduler.contract.connection import connect
from scheduler.contract.environment import EXIT_SETTINGS, NODE_ID, SettingsError
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


@contextmanager
def hold_node(state_dir: Path, node_id: str) -> Iterator[None]:
    """Be the only agent of this name on this state folder, until the end. The kernel lets go of it when we die.

    Raises:
        SettingsError: another one runs.
    """
    path = state_dir / "run" / f"agent-{quote(node_id, safe='')}.lock"
    descriptor = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise SettingsError(
            f'a node agent runs as node "{node_id}" on {state_dir} already: two of one name would start each worker '
            f"twice. Stop it, or give this one a name of its own in {NODE_ID}"
        ) from error
    except OSError as error:  # a folder that only reads: whoever runs such agents names them
        structlog.get_logger().warning("node_not_held", path=str(path), error=error.strerror)
    try:
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


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
        keyring = load_keyring(settings.process.state_dir)
        with hold_node(settings.process.state_dir, settings.process.node_id):
            uvloop.run(run_agent(settings, keyring, zygote))
    except (SettingsError, KeyRingError) as error:
        print(f"glowplug agent: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    return 0
