"""The process of a scheduler: from settings to a running loop, and its signals."""

from __future__ import annotations

import asyncio
import secrets
import signal

import uvloop

from scheduler.config import load_config
from scheduler.contract.connection import connect
from scheduler.contract.environment import ProcessSettings, read_process_settings
from scheduler.contract.telemetry import configure_logging
from scheduler.service import Scheduler


async def run_scheduler(settings: ProcessSettings) -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        SettingsError: the configuration file is not valid.
    """
    redis = connect(settings.redis_url)
    scheduler_id = f"{settings.node_id}:{secrets.token_hex(3)}"
    scheduler = Scheduler(redis, load_config(settings.config_path), scheduler_id, settings.config_path)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, scheduler.reloading.reload_in_background)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, scheduler.stop)
    try:
        await scheduler.run()
    finally:
        await redis.aclose()


def main() -> None:
    """Entry point of ``python -m scheduler scheduler``."""
    settings = read_process_settings()
    configure_logging(
        component="scheduler", level=settings.log_level, log_format=settings.log_format, log_dir=settings.log_dir
    )
    uvloop.run(run_scheduler(settings))
