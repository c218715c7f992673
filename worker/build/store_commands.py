"""``glowplug verify`` and ``glowplug keys``: look after snapshots and the keys that sign them.

Exit codes: 0 all is well, 1 a snapshot has problems, 2 the command could not do its work (usage, no key, no snapshot).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from scheduler.contract import environment
from scheduler.contract.environment import SettingsError
from snapshots.errors import SnapshotError
from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from snapshots.verification import Problem
from worker.agent_settings import DEV, load_keyring
from worker.build.progress import show_transfer

EXIT_PROBLEMS: Final = 1
EXIT_UNABLE: Final = 2

_state_dir_option = click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of snapshots and keys (default: the user's data folder).",
)
_key_file_option = click.option(
    "--key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Key file (default: GLOWPLUG_SNAPSHOT_KEYS, else STATE/keys/snapshot.keys).",
)


@click.command(short_help="Re-hash a snapshot and say what is wrong, and where.")
@click.argument("names", nargs=-1)
@_state_dir_option
@_key_file_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def verify(names: tuple[str, ...], state_dir: Path | None, key_file: Path | None, as_json: bool) -> None:
    """Check the signed manifest and every chunk of the snapshots NAMES (default: all).

    Exit code 0: all is well. 1: something is wrong, listed with its place. 2: could not check.
    """
    with _errors_exit():
        state_dir = _resolve(state_dir)
        keyring = KeyRing.from_file(key_file) if key_file else load_keyring(state_dir, _without_dev_keys())
        store = _open_store(state_dir)
        chosen = names or tuple(store.list_names())
        if not chosen:
            _fail(f"no snapshot in {store.root}: build one with `glowplug build SOURCE --name NAME`")
        findings = {name: _verify_one(store, name, keyring) for name in chosen}
    if as_json:
        click.echo(json.dumps(_as_json(findings), indent=2))
    else:
        for name, problems in findings.items():
            _print_findings(name, problems)
    if any(findings.values()):
        raise SystemExit(EXIT_PROBLEMS)


def _verify_one(store: SnapshotStore, name: str, keyring: KeyRing) -> list[Problem]:
    with show_transfer(f"verifying {name}") as on_progress:
        return store.verify(name, keyring, on_progress)


def _print_findings(name: str, problems: Sequence[Problem]) -> None:
    if not problems:
        click.echo(f"{name}: ok")
        return
    click.echo(f"{name}: {len(problems)} problem{'s' if len(problems) > 1 else ''}")
    for problem in problems:
        click.echo(f"  {problem.where}: {problem.what}")


def _as_json(findings: dict[str, list[Problem]]) -> dict[str, Any]:
    snapshots = [
        {"name": name, "ok": not problems, "problems": [problem._asdict() for problem in problems]}
        for name, problems in findings.items()
    ]
    return {"snapshots": snapshots}


@click.group(short_help="Manage the keys that sign snapshots.")
def keys() -> None:
    """Manage the keys that sign snapshots."""


@keys.command("new", short_help="Make a signing key.")
@_state_dir_option
@_key_file_option
@click.option("--key-id", help="Id of the key, shown in manifests and errors (default: random).")
@click.option("--rotate", is_flag=True, help="Add to an existing file: the new key signs, older ones still verify.")
def new_key(state_dir: Path | None, key_file: Path | None, key_id: str | None, rotate: bool) -> None:
    """Make a signing key in a file that only this user can read (mode 0600). Nothing is ever overwritten."""
    with _errors_exit():
        path = _key_path(state_dir, key_file)
        if rotate:
            keyring = KeyRing.rotate(path, key_id=key_id)
        elif path.exists():
            _fail(f"{path} exists already: use --rotate to add a key to it, or --key-file for another file")
        else:
            keyring = KeyRing.generate_file(path, key_id=key_id)
    click.echo(f"key {keyring.signing_key_id} signs from now on; kept in {path} (mode 0600)")


@keys.command("list", short_help="List key ids; never secrets.")
@_state_dir_option
@_key_file_option
def list_keys(state_dir: Path | None, key_file: Path | None) -> None:
    """List the ids of a key file's keys, and which one signs."""
    with _errors_exit():
        keyring = KeyRing.from_file(_key_path(state_dir, key_file))
    for key_id in keyring.key_ids:
        click.echo(f"{key_id}  {'signs' if key_id == keyring.signing_key_id else 'verifies'}")


def _key_path(state_dir: Path | None, key_file: Path | None) -> Path:
    named = os.environ.get(environment.SNAPSHOT_KEYS)
    if key_file is not None:
        return key_file.absolute()
    if named and state_dir is None:
        return Path(named).absolute()
    return _resolve(state_dir) / "keys" / "snapshot.keys"


def _resolve(state_dir: Path | None) -> Path:
    return (state_dir or environment.read_process_settings().state_dir).absolute()


def _open_store(state_dir: Path) -> SnapshotStore:
    root = state_dir / "store"
    if not root.is_dir():
        _fail(f"no snapshots below {state_dir}: build one with `glowplug build SOURCE --name NAME`, or set --state-dir")
    return SnapshotStore(root)


def _without_dev_keys() -> dict[str, str]:
    """The environment, minus the switch that would make a fresh key: that could verify nothing that exists."""
    return {name: value for name, value in os.environ.items() if name != DEV}


class _Unable(click.ClickException):
    """Shown as one line on stderr."""

    exit_code = EXIT_UNABLE


def _fail(message: str) -> NoReturn:
    raise _Unable(message)


@contextmanager
def _errors_exit() -> Iterator[None]:
    """Our own errors become one line on stderr and exit code 2."""
    try:
        yield
    except (SnapshotError, SettingsError, OSError) as error:
        raise _Unable(str(error)) from error
