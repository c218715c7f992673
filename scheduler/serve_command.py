"""Verbs that start processes: ``serve`` for one machine, and its parts one by one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from scheduler.command import state_dir_option
from scheduler.contract import environment


@click.command()
@state_dir_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free port.")
@click.option("--idle-timeout-s", type=click.FloatRange(min=0.05), help="Scale a model to zero after this idle time.")
@click.option("--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="glowplug.yaml")
@click.option("--dev", is_flag=True, help="Make a signing key in the state folder if there is none.")
def serve(state_dir: Path, host: str, port: int, idle_timeout_s: float | None, config: Path | None, dev: bool) -> None:
    """Start embedded Redis (or use REDIS_URL), gateway, scheduler and node agent; Ctrl-C drains and stops them."""
    from scheduler.supervisor import ServeOptions, run_serve

    _check_config(config)
    options = ServeOptions(
        state_dir=state_dir, host=host, port=port, idle_timeout_s=idle_timeout_s, config_path=config, dev=dev
    )
    sys.exit(run_serve(options))


@click.command()
@state_dir_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free port.")
def gateway(state_dir: Path, host: str, port: int) -> None:
    """Start the HTTP gateway alone; finds the rest through REDIS_URL."""
    os.environ.update(GLOWPLUG_HOST=host, GLOWPLUG_PORT=str(port))
    _become("scheduler", "gateway")


@click.command()
@state_dir_option
@click.option("--idle-timeout-s", type=click.FloatRange(min=0.05), help="Scale a model to zero after this idle time.")
@click.option("--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="glowplug.yaml")
def scheduler(state_dir: Path, idle_timeout_s: float | None, config: Path | None) -> None:
    """Start the scheduler alone; finds the rest through REDIS_URL."""
    _check_config(config)
    if idle_timeout_s is not None:
        os.environ["GLOWPLUG_IDLE_TIMEOUT_S"] = str(idle_timeout_s)
    if config is not None:
        os.environ[environment.CONFIG] = str(config)
    _become("scheduler", "scheduler")


@click.command()
@state_dir_option
def agent(state_dir: Path) -> None:
    """Start the node agent alone; it starts and stops this machine's workers."""
    _become("worker", "agent")


def _become(module: str, mode: str) -> None:
    """Replace this process with one part, so that signals reach it directly."""
    os.execv(sys.executable, [sys.executable, "-m", module, mode])


def _check_config(path: Path | None) -> None:
    from scheduler.config import load_config

    try:
        load_config(path)
    except environment.SettingsError as error:
        raise click.ClickException(str(error)) from error
