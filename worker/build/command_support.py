"""What the commands that look after snapshots share: options, where store and keys are, how they end.

Exit codes: 0 all is well, 1 a snapshot has problems, 2 the command could not do its work (usage, no key, no snapshot).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn

import click

from scheduler.contract import environment
from scheduler.contract.environment import SettingsError
from snapshots.errors import SnapshotError
from snapshots.keyring import KeyRing
from snapshots.rollback import NewestSeen
from snapshots.store import SnapshotStore
from worker.agent_settings import DEV, load_keyring, newest_record

EXIT_PROBLEMS: Final = 1
EXIT_UNABLE: Final = 2

state_dir_option = click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of snapshots and keys (default: the user's data folder).",
)
key_file_option = click.option(
    "--key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Key file (default: GLOWPLUG_SNAPSHOT_KEYS, else STATE/keys/snapshot.keys).",
)


def open_store_and_keys(state_dir: Path | None, key_file: Path | None) -> tuple[SnapshotStore, KeyRing]:
    """The store of a state folder that exists, with its rollback record, and the keys.

    Raises:
        click.ClickException: no store.
        SnapshotError, SettingsError: no keys, or they are malformed.
    """
    state_dir = resolve_state_dir(state_dir)
    keyring = read_keyring(state_dir, key_file)
    return open_store(state_dir), keyring


def read_keyring(state_dir: Path, key_file: Path | None) -> KeyRing:
    """The keys that were named, else those that serving uses. Never makes one: it could verify nothing that exists.

    Raises:
        SnapshotError, SettingsError: no keys, or they are malformed.
    """
    environment_without_dev = {name: value for name, value in os.environ.items() if name != DEV}
    return KeyRing.from_file(key_file) if key_file else load_keyring(state_dir, environment_without_dev)


def open_store(state_dir: Path) -> SnapshotStore:
    """The store of a state folder, which must exist: a mistyped folder is an error, not a new, empty store.

    Raises:
        click.ClickException: there is none.
    """
    root = state_dir / "store"
    if not root.is_dir():
        fail(f"no snapshots below {state_dir}: build one with `glowplug build SOURCE --name NAME`, or set --state-dir")
    return SnapshotStore(root, newest=NewestSeen(newest_record(state_dir)))


def resolve_state_dir(state_dir: Path | None) -> Path:
    """The state folder that was named, else the process's."""
    return (state_dir or environment.read_state_dir()).absolute()


class Unable(click.ClickException):
    """Shown as one line on stderr."""

    exit_code = EXIT_UNABLE


def fail(message: str) -> NoReturn:
    """End the command with exit code 2.

    Raises:
        Unable: always.
    """
    raise Unable(message)


@contextmanager
def errors_exit() -> Iterator[None]:
    """Our own errors become one line on stderr and exit code 2."""
    try:
        yield
    except (SnapshotError, SettingsError, OSError) as error:
        raise Unable(str(error)) from error
