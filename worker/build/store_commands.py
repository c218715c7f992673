"""``glowplug verify`` and ``glowplug gc``: look after the snapshots of a store (exit codes: command_support)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from guests.compile import guest_identity
from snapshots.errors import Incompatible, SnapshotError
from snapshots.fs_verity import VerityFinding, examine_verity
from snapshots.keyring import KeyRing
from snapshots.manifest import verify_identity
from snapshots.store import GARBAGE_GRACE_S, SnapshotStore
from snapshots.verification import Problem
from worker.build.command_support import (
    EXIT_PROBLEMS,
    errors_exit,
    fail,
    key_file_option,
    open_store_and_keys,
    state_dir_option,
)
from worker.build.progress import show_transfer


@dataclass(frozen=True, slots=True)
class _Findings:
    """What is wrong with one snapshot, and what the kernel says of its files."""

    name: str
    problems: list[Problem]
    fs_verity: dict[str, VerityFinding]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ok": not self.problems,
            "problems": [problem._asdict() for problem in self.problems],
            "fs_verity": {role: asdict(finding) for role, finding in self.fs_verity.items()},
        }


@click.command(short_help="Re-hash a snapshot and say what is wrong, and where.")
@click.argument("names", nargs=-1)
@state_dir_option
@key_file_option
@click.option("--any-machine", is_flag=True, help="Do not check that the compiled guest fits this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON, fs-verity included.")
def verify(
    names: tuple[str, ...], state_dir: Path | None, key_file: Path | None, any_machine: bool, as_json: bool
) -> None:
    """Check the signed manifest, every chunk and the fit to this machine of the snapshots NAMES (default: all).

    Exit code 0: all is well. 1: something is wrong, listed with its place. 2: could not check.
    """
    with errors_exit():
        store, keyring = open_store_and_keys(state_dir, key_file)
        chosen = names or tuple(store.list_names())
        if not chosen:
            fail(f"no snapshot in {store.root}: build one with `glowplug build SOURCE --name NAME`")
        findings = [_verify_one(store, name, keyring, any_machine=any_machine) for name in chosen]
    if as_json:
        click.echo(json.dumps({"snapshots": [finding.as_json() for finding in findings]}, indent=2))
    else:
        for finding in findings:
            _print_findings(finding)
    if any(finding.problems for finding in findings):
        raise SystemExit(EXIT_PROBLEMS)


def _verify_one(store: SnapshotStore, name: str, keyring: KeyRing, *, any_machine: bool) -> _Findings:
    with show_transfer(f"verifying {name}") as on_progress:
        problems = store.verify(name, keyring, on_progress)
    try:
        manifest = store.read_manifest(name, keyring)
    except SnapshotError:
        return _Findings(name, problems, {})  # that is the problem already
    if not any_machine:
        try:
            verify_identity(manifest, guest_identity())
        except Incompatible as error:
            problems = [*problems, Problem("identity", "; ".join(error.differences))]
    fs_verity = {role: examine_verity(store.blob_path(ref), ref) for role, ref in manifest.blobs.items()}
    return _Findings(name, problems, fs_verity)


def _print_findings(finding: _Findings) -> None:
    if not finding.problems:
        click.echo(f"{finding.name}: ok")
        return
    num_problems = len(finding.problems)
    click.echo(f"{finding.name}: {num_problems} problem{'s' if num_problems > 1 else ''}")
    for problem in finding.problems:
        click.echo(f"  {problem.where}: {problem.what}")


@click.command(short_help="Delete blobs that no snapshot names.")
@state_dir_option
@key_file_option
@click.option(
    "--grace-s",
    type=click.FloatRange(min=0),
    default=GARBAGE_GRACE_S,
    show_default=True,
    help="Keep blobs younger than this, in seconds: a build in progress has blobs before it has a manifest.",
)
def gc(state_dir: Path | None, key_file: Path | None, grace_s: float) -> None:
    """Delete blobs that no snapshot of the store names. Nothing is deleted while any manifest does not verify."""
    with errors_exit():
        store, keyring = open_store_and_keys(state_dir, key_file)
        report = store.collect_garbage(keyring, grace_s=grace_s)
    click.echo(f"deleted {report.num_blobs} blob{'' if report.num_blobs == 1 else 's'}, {report.freed_bytes:,} bytes")
