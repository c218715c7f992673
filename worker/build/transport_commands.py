"""``glowplug export`` and ``glowplug import``: a snapshot as one file (exit codes: command_support)."""

from __future__ import annotations

from pathlib import Path

import click

from guests.compile import guest_identity
from snapshots.errors import Incompatible
from snapshots.manifest import verify_identity
from snapshots.rollback import NewestSeen
from snapshots.store import SnapshotStore
from snapshots.transport import DEFAULT_LEVEL, MAX_LEVEL, MIN_LEVEL, TransportReport, export_snapshot, import_snapshot
from worker.agent_settings import newest_record
from worker.build.command_support import (
    errors_exit,
    key_file_option,
    open_store_and_keys,
    read_keyring,
    resolve_state_dir,
    state_dir_option,
)
from worker.build.progress import show_transfer


@click.command("export", short_help="Write a snapshot to one compressed file.")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--level",
    type=click.IntRange(MIN_LEVEL, MAX_LEVEL),
    default=DEFAULT_LEVEL,
    show_default=True,
    help="zstd level; weights hardly shrink further with a higher one (table: snapshots/DESIGN.md).",
)
@state_dir_option
@key_file_option
def export_command(name: str, file: Path, level: int, state_dir: Path | None, key_file: Path | None) -> None:
    """Write the snapshot NAME to the new FILE, compressed chunk by chunk. Every chunk is verified first."""
    with errors_exit():
        store, keyring = open_store_and_keys(state_dir, key_file)
        with show_transfer(f"exporting {name}") as on_progress:
            report = export_snapshot(store, name, keyring, file.absolute(), level=level, on_progress=on_progress)
    _print_report("exported", report)


@click.command("import", short_help="Bring a snapshot in from a file.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--name", help="Name to give it: it is signed anew, which needs a signing key (default: its own).")
@click.option("--allow-older", is_flag=True, help="Replace a newer snapshot of that name: a deliberate way back.")
@state_dir_option
@key_file_option
def import_command(
    file: Path, name: str | None, allow_older: bool, state_dir: Path | None, key_file: Path | None
) -> None:
    """Bring the snapshot in FILE into the store. Its signature and every chunk are verified; all of it or nothing."""
    with errors_exit():
        state_dir = resolve_state_dir(state_dir)
        keyring = read_keyring(state_dir, key_file)
        store = SnapshotStore(state_dir / "store", newest=NewestSeen(newest_record(state_dir)))
        with show_transfer(f"importing {file.name}") as on_progress:
            manifest, report = import_snapshot(
                store, file, keyring, name=name, allow_older=allow_older, on_progress=on_progress
            )
    _print_report("imported", report)
    try:
        verify_identity(manifest, guest_identity())
    except Incompatible as error:
        click.echo(f"note: it cannot serve on this machine. {error}", err=True)


def _print_report(verb: str, report: TransportReport) -> None:
    click.echo(
        f"{verb} {report.name} {report.snapshot_id}: {report.num_chunks} chunks, {report.stored_bytes:,} bytes, "
        f"{report.file_bytes:,} as a file ({report.file_bytes / report.stored_bytes:.1%})"
    )
