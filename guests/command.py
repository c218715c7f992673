"""``glowplug guests``: compile, inspect and run guests; also ``python -m guests``."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from guests import binding, component_format
from guests.compile import compile_guest
from guests.elf_sections import MAGIC as ELF_MAGIC
from guests.errors import GuestContractError, GuestError
from guests.initialise import initialise_guest
from guests.inspection import inspect_guest, report_lines
from guests.memory import GuestMemory
from guests.runtime import REQUIRED_SEALS, GuestEngine, GuestInstance, InstanceLimits
from guests.serving_host import serving_functions
from guests.signatures import EXPORTS
from guests.text import GuestText

MAX_SHOWN_BYTES: Final = 256
LOW_32: Final = 0xFFFF_FFFF
FILE: Final = click.Path(path_type=Path, exists=True, dir_okay=False)

json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def guests() -> None:
    """Compile, inspect and run guests (WebAssembly that belongs to a model)."""


@contextmanager
def _errors_shown() -> Iterator[None]:
    try:
        yield
    except (GuestError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _show(result: dict[str, Any], as_json: bool) -> None:
    click.echo(json.dumps(result) if as_json else "\n".join(report_lines(result)))


def _parse_assets(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    assets = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not name or not Path(path).is_file():
            raise click.BadParameter(f"{value!r}: expected NAME=FILE, with a file that exists")
        assets[name] = Path(path)
    return assets


@guests.command("compile")
@click.argument("file", type=FILE)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where the code goes (default: FILE.cwasm).")
@click.option("--baked", type=click.Path(path_type=Path), help="Also write the initialised module here.")
@click.option("--asset", "assets", multiple=True, callback=_parse_assets, metavar="NAME=FILE", help="For gp_init.")
@click.option("--tensor", "tensors", multiple=True, metavar="NAME", help="A weight that gp_init may ask for.")
@json_option
def compile_command(
    file: Path,
    output: Path | None,
    baked: Path | None,
    assets: dict[str, Path],
    tensors: tuple[str, ...],
    as_json: bool,
) -> None:
    """Initialise FILE, freeze it and compile it; a component (Python guest) is compiled as it is.

    FILE is handled by confined processes. What comes out is native code: run only what you compiled.
    """
    started_s = time.monotonic()
    with _errors_shown():
        wasm = file.read_bytes()
        result: dict[str, Any] = {}
        if wasm.startswith(component_format.PREAMBLE):
            from guests.component import compile_component  # only Python guests need it

            code = compile_component(wasm)
        else:
            guest = initialise_guest(wasm, {name: path.read_bytes() for name, path in assets.items()}, tensors)
            code = compile_guest(guest.baked_wasm)
            result = {
                "programs": {kind.name: len(program) for kind, program in guest.programs.items()},
                "tensor_handles": list(guest.tensor_handles),
                "has_tokenizer": guest.has_tokenizer,
                "log": [f"{line.level.name}: {line.text}" for line in guest.log],
                "host_bytes": guest.host_bytes,
                "baked_bytes": len(guest.baked_wasm),
            }
            if baked is not None:
                baked.write_bytes(guest.baked_wasm)
        target = output or file.with_suffix(".cwasm")
        target.write_bytes(code)
    wall_s = round(time.monotonic() - started_s, 3)
    _show({"output": str(target), "code_bytes": len(code), "wall_s": wall_s, **result}, as_json)


@guests.command("inspect")
@click.argument("file", type=FILE)
@json_option
def inspect_command(file: Path, as_json: bool) -> None:
    """Say what FILE is and holds: a module, a component or a compiled guest. Nothing of it is run."""
    with _errors_shown():
        report = inspect_guest(file.read_bytes())
    _show({"file": str(file), **report}, as_json)


@guests.command("run")
@click.argument("file", type=FILE)
@click.argument("arguments", type=int, nargs=-1)
@click.option("--tokenize", "text", metavar="TEXT", help="Token ids of TEXT, and back.")
@click.option("--call", "export", metavar="NAME", help="Call an export of the ABI with ARGUMENTS (default: gp_abi).")
@click.option("--post-process", "answer", metavar="TEXT", help="What a Python guest makes of TEXT.")
@click.option("--seed", type=int, default=0, help="For gp_resume.")
@click.option("--deadline-ms", type=click.IntRange(min=1), default=5000, help="Of each call.")
@json_option
def run_command(
    file: Path,
    arguments: tuple[int, ...],
    text: str | None,
    export: str | None,
    answer: str | None,
    seed: int,
    deadline_ms: int,
    as_json: bool,
) -> None:
    """Restore a guest and call it. FILE is baked WebAssembly, a component, or what `compile` made of them.

    Compiled code is run as it is, inside this process: only give a .cwasm that you compiled yourself.
    """
    if sum(option is not None for option in (text, export, answer)) > 1:
        raise click.UsageError("choose one of --tokenize, --call and --post-process")
    with _errors_shown():
        if answer is not None:
            result = _post_process(file.read_bytes(), answer, seed, deadline_ms)
        else:
            limits = InstanceLimits(call_deadline_ms=deadline_ms)
            if text is not None:
                result = _run(file.read_bytes(), lambda engine, path: _tokenize(engine, path, text, seed, limits))
            else:
                name = export or "gp_abi"
                result = _run(
                    file.read_bytes(), lambda engine, path: _call(engine, path, name, arguments, seed, limits)
                )
    _show(result, as_json)


def _run(data: bytes, action: Callable[[GuestEngine, str], dict[str, Any]]) -> dict[str, Any]:
    code = data if data.startswith(ELF_MAGIC) else compile_guest(data)
    with _sealed(code) as path, GuestEngine(serving_functions() | {"log": _print_line}) as engine:
        engine.start_ticker()
        return action(engine, path)


def _print_line(memory: GuestMemory, level: int, pointer: int, length: int) -> None:
    _print_text(level, memory.read(pointer, min(length, MAX_SHOWN_BYTES)).decode(errors="replace"))


def _print_text(level: int, text: str) -> None:
    click.echo(f"guest log, level {level}: {text}", err=True)


def _tokenize(engine: GuestEngine, path: str, text: str, seed: int, limits: InstanceLimits) -> dict[str, Any]:
    started_ns = time.perf_counter_ns()
    module = engine.load(path)
    guest = GuestText(module, seed, limits)
    restored_ns = time.perf_counter_ns()
    try:
        ids = guest.tokenize(text, add_special=True, parse_special=True)
        tokenised_ns = time.perf_counter_ns()
        return {
            "token_ids": ids,
            "text": guest.detokenize(ids),
            "restore_us": (restored_ns - started_ns) / 1000,
            "tokenize_us": (tokenised_ns - restored_ns) / 1000,
        }
    finally:
        guest.close()
        module.close()


def _call(
    engine: GuestEngine, path: str, name: str, arguments: tuple[int, ...], seed: int, limits: InstanceLimits
) -> dict[str, Any]:
    if name not in EXPORTS:
        raise GuestContractError(f"{name} is not in the ABI: {', '.join(EXPORTS)}")
    module = engine.load(path)
    try:
        with module.instantiate(limits) as instance:
            started_ns = time.perf_counter_ns()
            resumed = instance.call("gp_resume", seed)
            value = instance.call(name, *arguments)
            wall_us = (time.perf_counter_ns() - started_ns) / 1000
            return {"export": name, "gp_resume": resumed, "result": value, "wall_us": wall_us} | _pointed_at(
                instance, name, value
            )
    finally:
        module.close()


def _pointed_at(instance: GuestInstance, name: str, value: int) -> dict[str, Any]:
    """What a packed result points to, if it does."""
    if EXPORTS[name].result != binding.KIND_I64 or value == -1:
        return {}
    data = instance.read(value >> 32 & LOW_32, min(value & LOW_32, MAX_SHOWN_BYTES))
    return {"count": value & LOW_32, "bytes_hex": data.hex()}


def _post_process(data: bytes, text: str, seed: int, deadline_ms: int) -> dict[str, Any]:
    from guests.component import COMPONENT_LIMITS, ComponentEngine, PostProcessor, compile_component

    code = data if data.startswith(ELF_MAGIC) else compile_component(data)
    limits = InstanceLimits(COMPONENT_LIMITS.memory_bytes, call_deadline_ms=deadline_ms)
    with _sealed(code) as path, ComponentEngine(_print_text) as engine:
        engine.start_ticker()
        started_ns = time.perf_counter_ns()
        component = engine.load(path)
        guest = PostProcessor(engine, component, seed, limits)
        restored_ns = time.perf_counter_ns()
        try:
            return {"text": guest.post_process(text), "restore_us": (restored_ns - started_ns) / 1000}
        finally:
            guest.close()
            component.close()


@contextmanager
def _sealed(code: bytes) -> Iterator[str]:
    """``/proc/self/fd/N`` of a sealed memory file that holds ``code``."""
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(code)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, REQUIRED_SEALS | fcntl.F_SEAL_SEAL)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
