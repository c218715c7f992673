"""Verbs that start processes: ``serve`` for one machine, and its parts one by one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Final

import click

from scheduler.command import state_dir_option
from scheduler.contract import environment

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8080


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Settings (default: GLOWPLUG_CONFIG, else glowplug.yaml in the state folder, if there is one).",
)


def listener_options(function: Any) -> Any:
    """What ``serve`` and ``gateway`` share: where to listen, TLS, and whether keys are needed."""
    file = click.Path(path_type=Path, exists=True, dir_okay=False, resolve_path=True)
    for option in (
        click.option("--no-auth", is_flag=True, help="Need no API keys, on loopback only, even if there are some."),
        click.option("--tls-key", type=file, help="PEM file of its private key."),
        click.option("--tls-cert", type=file, help="PEM file: serve HTTPS with this certificate (SIGHUP: read again)."),
        click.option("--port", type=click.IntRange(0, 65535), help="0: any free.  [default: 8080]"),
        click.option("--host", help="Address to listen on.  [default: 127.0.0.1]"),
    ):
        function = option(function)
    return function


def export_listener(tls_cert: Path | None, tls_key: Path | None, no_auth: bool) -> None:
    """Hand the options on to the gateway process.

    Raises:
        UsageError: one of the two TLS files is missing.
    """
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    if tls_cert is not None and tls_key is not None:
        os.environ.update(GLOWPLUG_TLS_CERT=str(tls_cert), GLOWPLUG_TLS_KEY=str(tls_key))
    if no_auth:
        os.environ["GLOWPLUG_NO_AUTH"] = "1"


@click.command()
@state_dir_option
@listener_options
@click.option("--idle-timeout-s", type=click.FloatRange(min=0.05), help="Scale a model to zero after this idle time.")
@config_option
@click.option("--dev", is_flag=True, help="Make a signing key in the state folder if there is none.")
def serve(
    state_dir: Path,
    host: str | None,
    port: int | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    no_auth: bool,
    idle_timeout_s: float | None,
    config: Path | None,
    dev: bool,
) -> None:
    """Start embedded Redis (or use REDIS_URL), gateway, scheduler and node agent; Ctrl-C drains and stops them."""
    from scheduler.supervisor import ServeOptions, run_serve

    _check_settings(config)
    export_listener(tls_cert, tls_key, no_auth)
    host, port = _choose_address(host, port)
    os.environ.setdefault(environment.LOG_DIR, str(state_dir / "log"))
    options = ServeOptions(
        state_dir=state_dir, host=host, port=port, idle_timeout_s=idle_timeout_s, config_path=config, dev=dev
    )
    sys.exit(run_serve(options))


@click.command()
@state_dir_option
@listener_options
@config_option
def gateway(
    state_dir: Path,
    host: str | None,
    port: int | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    no_auth: bool,
    config: Path | None,
) -> None:
    """Start the HTTP gateway alone; finds the rest through REDIS_URL."""
    _check_settings(config)
    export_listener(tls_cert, tls_key, no_auth)
    host, port = _choose_address(host, port)
    os.environ.update(GLOWPLUG_HOST=host, GLOWPLUG_PORT=str(port))
    _become("scheduler", "gateway")


@click.command()
@state_dir_option
@click.option("--idle-timeout-s", type=click.FloatRange(min=0.05), help="Scale a model to zero after this idle time.")
@config_option
def scheduler(state_dir: Path, idle_timeout_s: float | None, config: Path | None) -> None:
    """Start the scheduler alone; finds the rest through REDIS_URL."""
    _check_settings(config)
    if idle_timeout_s is not None:
        os.environ["GLOWPLUG_IDLE_TIMEOUT_S"] = str(idle_timeout_s)
    _become("scheduler", "scheduler")


@click.command()
@state_dir_option
@config_option
def agent(state_dir: Path, config: Path | None) -> None:
    """Start the node agent alone; it starts and stops this machine's workers."""
    _check_settings(config)
    _become("worker", "agent")


def _become(module: str, mode: str) -> None:
    """Replace this process with one part, so that signals reach it directly."""
    os.execv(sys.executable, [sys.executable, "-m", module, mode])


def _check_settings(path: Path | None) -> None:
    """Check environment and configuration, and set from the file what the environment does not say; children inherit
    both.

    Raises:
        SettingsError: one of them cannot be used.
    """
    from scheduler.contract.config_file import apply_config_file, find_config

    if path is not None:
        os.environ[environment.CONFIG] = str(path.absolute())
    if (found := find_config()) is not None:
        from scheduler.config import load_config  # YAML is not imported where there is no file

        load_config(found)
        apply_config_file()
    environment.read_process_settings()


def _choose_address(host: str | None, port: int | None) -> tuple[str, int]:
    """Where to listen: the options, else the environment (or the configuration file), else loopback.

    Raises:
        SettingsError: the environment's port is none.
    """
    text = os.environ.get("GLOWPLUG_PORT") or str(DEFAULT_PORT)
    if port is None and not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise environment.SettingsError(f'GLOWPLUG_PORT="{text}": expected a whole number from 0 to 65535')
    return host or os.environ.get("GLOWPLUG_HOST") or DEFAULT_HOST, int(text) if port is None else port
