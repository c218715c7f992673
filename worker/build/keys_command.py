"""``glowplug keys`` and ``glowplug resign``: the keys that sign and encrypt snapshots (exit codes: command_support)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import click

from scheduler.contract import environment
from snapshots.errors import SnapshotError
from snapshots.key_file import KeyStatus
from snapshots.keyring import KeyRing
from snapshots.manifest import read_key_id
from snapshots.store import SnapshotStore
from worker.build.command_support import (
    EXIT_PROBLEMS,
    errors_exit,
    fail,
    key_file_option,
    open_store_and_keys,
    resolve_state_dir,
    state_dir_option,
)

_key_id_option = click.option("--key-id", help="Id of the key, shown in manifests and errors (default: random).")
_DOES: Final[dict[KeyStatus, str]] = {
    "active": "verifies",  # the last one signs
    "verify": "verifies",
    "revoked": "revoked",
    "encrypt": "decrypts",  # the last one encrypts
    "decrypt": "decrypts",
}


@click.group(short_help="Manage the keys that sign and encrypt snapshots.")
def keys() -> None:
    """Manage the keys that sign and encrypt snapshots; those that clients send are under `glowplug keys api`."""


@keys.command("new", short_help="Make a key file with a signing key.")
@state_dir_option
@key_file_option
@_key_id_option
def new_key(state_dir: Path | None, key_file: Path | None, key_id: str | None) -> None:
    """Make a signing key in a file that only this user can read (mode 0600). Nothing is ever overwritten."""
    with errors_exit():
        path = _key_path(state_dir, key_file)
        if path.exists():
            fail(f"{path} exists already: add a key to it with `glowplug keys rotate`, or name another with --key-file")
        keyring = KeyRing.generate_file(path, key_id=key_id)
    click.echo(f"key {keyring.signing_key_id} signs from now on; kept in {path} (mode 0600)")


@keys.command("rotate", short_help="Add a key that signs (or encrypts) from now on.")
@state_dir_option
@key_file_option
@_key_id_option
@click.option("--encryption", is_flag=True, help="A key that encrypts; the first one, too, is made this way.")
def rotate_key(state_dir: Path | None, key_file: Path | None, key_id: str | None, encryption: bool) -> None:
    """Add a key to the key file. Keys before it only verify (or decrypt) from now on: `glowplug resign --all` next."""
    with errors_exit():
        path = _key_path(state_dir, key_file)
        keyring = KeyRing.rotate(path, key_id=key_id, encryption=encryption)
    if encryption:
        click.echo(f"key {keyring.encryption_key_id} encrypts from now on; kept in {path}. Losing it loses its blobs")
    else:
        click.echo(f"key {keyring.signing_key_id} signs from now on; kept in {path}. Next: glowplug resign --all")


@keys.command("revoke", short_help="Refuse whatever a key has signed.")
@click.argument("key_id")
@state_dir_option
@key_file_option
def revoke_key(key_id: str, state_dir: Path | None, key_file: Path | None) -> None:
    """Revoke the signing key KEY_ID: its secret is removed, and what it signed is refused by name.

    Running agents take it at their next start.
    """
    with errors_exit():
        keyring = KeyRing.revoke(_key_path(state_dir, key_file), key_id)
    signer = keyring.signing_key_id
    click.echo(
        f"key {key_id} is revoked; restart serving processes. {f'Key {signer} signs' if signer else 'None signs'}"
    )


@keys.command("list", short_help="List key ids; never secrets.")
@state_dir_option
@key_file_option
def list_keys(state_dir: Path | None, key_file: Path | None) -> None:
    """List the ids of a key file's keys, and what each does."""
    with errors_exit():
        keyring = KeyRing.from_file(_key_path(state_dir, key_file))
    for key_id, status in keyring.statuses.items():
        does = {keyring.signing_key_id: "signs", keyring.encryption_key_id: "encrypts"}.get(key_id, _DOES[status])
        click.echo(f"{key_id}  {does}")


@click.command(short_help="Sign snapshots with the newest key.")
@click.argument("names", nargs=-1)
@click.option("--all", "all_names", is_flag=True, help="Every snapshot of the store.")
@state_dir_option
@key_file_option
def resign(names: tuple[str, ...], all_names: bool, state_dir: Path | None, key_file: Path | None) -> None:
    """Verify NAMES with the key that signed them, then sign them with the newest. Nothing else of them changes.

    Exit code 1: some do not verify (they are listed, and unchanged).
    """
    if bool(names) == all_names:
        raise click.UsageError("name the snapshots, or give --all")
    with errors_exit():
        store, keyring = open_store_and_keys(state_dir, key_file)
        newest = keyring.signing_key_id
        if newest is None:
            fail("every key found only verifies: make one that signs with `glowplug keys rotate`")
        failed = [name for name in names or store.list_names() if not _resign_one(store, name, keyring, newest)]
    if failed:
        raise SystemExit(EXIT_PROBLEMS)


def _resign_one(store: SnapshotStore, name: str, keyring: KeyRing, newest: str) -> bool:
    try:
        manifest, container = store.read_signed(name, keyring)
        signer = read_key_id(container)
        if signer != newest:
            store.write_manifest(manifest, keyring)
    except SnapshotError as error:
        click.echo(f"{name}: not signed: {error}", err=True)
        return False
    click.echo(f"{name}: signed with {newest}" + (" already" if signer == newest else f", before with {signer}"))
    return True


def _key_path(state_dir: Path | None, key_file: Path | None) -> Path:
    named = os.environ.get(environment.SNAPSHOT_KEYS)
    if key_file is not None:
        return key_file.absolute()
    if named and state_dir is None:
        return Path(named).absolute()
    return resolve_state_dir(state_dir) / "keys" / "snapshot.keys"
