"""Settings of a process, read once from the environment, with errors that name the variable and the remedy."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

STATE_DIR: Final = "GLOWPLUG_STATE_DIR"
REDIS_URL: Final = "REDIS_URL"
NODE_ID: Final = "GLOWPLUG_NODE_ID"
LOG_LEVEL: Final = "GLOWPLUG_LOG_LEVEL"
LOG_FORMAT: Final = "GLOWPLUG_LOG_FORMAT"
LOG_DIR: Final = "GLOWPLUG_LOG_DIR"
CONFIG: Final = "GLOWPLUG_CONFIG"
SNAPSHOT_KEYS: Final = "GLOWPLUG_SNAPSHOT_KEYS"  # path of the key file
SNAPSHOT_KEY: Final = "GLOWPLUG_SNAPSHOT_KEY"  # "key-id:hex", instead of a file
#: A process whose settings cannot be used ends with this: starting it again cannot help. Source: sysexits.h, EX_CONFIG.
EXIT_SETTINGS: Final = 78


class SettingsError(ValueError):
    """A variable is missing or malformed; the message names it, what was seen and an example."""


class ProcessSettings(msgspec.Struct, frozen=True):
    """What every process of glowplug needs to know."""

    state_dir: Path
    redis_url: str
    node_id: str
    log_level: str
    config_path: Path | None
    log_format: str = "auto"
    log_dir: Path | None = None  # None: no log files


def default_state_dir(env: Mapping[str, str] = os.environ) -> Path:
    """The user's data folder for glowplug (XDG_DATA_HOME, else ~/.local/share)."""
    base = env.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "glowplug"


def read_state_dir(env: Mapping[str, str] = os.environ) -> Path:
    """The folder of snapshots, keys and queue; absolute."""
    return Path(env.get(STATE_DIR) or default_state_dir(env)).expanduser().absolute()


def read_process_settings(env: Mapping[str, str] = os.environ) -> ProcessSettings:
    """Settings of this process.

    Raises:
        SettingsError: a value is malformed.
    """
    state_dir = read_state_dir(env)
    redis_url = env.get(REDIS_URL) or f"unix://{state_dir}/redis/redis.sock"
    schemes = ("unix://", "redis://", "rediss://", "redis+sentinel://", "rediss+sentinel://")
    if not redis_url.startswith(schemes):
        scheme = redis_url.partition("://")[0][:40]  # the rest may hold a password
        raise SettingsError(
            f'{REDIS_URL} begins with "{scheme}": expected redis://HOST:PORT/DB, rediss://..., unix:///path/to.sock '
            "or redis+sentinel://HOST:PORT,HOST:PORT/SERVICE"
        )
    level = (env.get(LOG_LEVEL) or "info").lower()
    if level not in {"debug", "info", "warning", "error", "critical"}:
        raise SettingsError(f'{LOG_LEVEL}="{level}": expected debug, info, warning, error or critical')
    log_format = (env.get(LOG_FORMAT) or "auto").lower()
    if log_format not in {"auto", "json", "console"}:
        raise SettingsError(f'{LOG_FORMAT}="{log_format}": expected auto, json or console')
    log_dir = env.get(LOG_DIR)
    config = env.get(CONFIG)
    return ProcessSettings(
        state_dir=state_dir,
        redis_url=redis_url,
        node_id=env.get(NODE_ID) or socket.gethostname(),
        log_level=level,
        config_path=Path(config) if config else None,
        log_format=log_format,
        log_dir=Path(log_dir).expanduser() if log_dir and log_dir != "off" else None,
    )


def read_positive_float(name: str, default: float, env: Mapping[str, str] = os.environ) -> float:
    """A positive number from variable ``name``.

    Raises:
        SettingsError: not a positive number.
    """
    text = env.get(name)
    if text is None or text == "":
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise SettingsError(f'{name}="{text}": expected a positive number, e.g. {default:g}')
    return value
