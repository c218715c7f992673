"""``glowplug kernels``: build, check and show the CUDA kernels. Needs no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from worker.backends.kernels.build import KNOWN_ARCHITECTURES, SHIPPED_ARCHITECTURES, build_kernels
from worker.backends.kernels.manifest import FATBIN_NAME, StaleKernelsError, load_manifest, verify_kernels
from worker.backends.kernels.nvrtc import KernelBuildError
from worker.backends.kernels.sources import KERNELS_FOLDER

_ARCHITECTURES_HELP: Final = (
    "Compute capabilities, e.g. 80,90 (known: " + ",".join(map(str, KNOWN_ARCHITECTURES)) + ")."
)


@click.group()
def kernels() -> None:
    """Build and check the CUDA kernels that the GPU backend loads."""


def _parse_architectures(_ctx: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        chosen = tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: expected numbers such as 80,90") from error
    unknown = sorted(set(chosen) - set(KNOWN_ARCHITECTURES))
    if unknown:
        raise click.BadParameter(f"{unknown}: the kernels compile for {', '.join(map(str, KNOWN_ARCHITECTURES))}")
    return chosen


@kernels.command()
@click.option(
    "--arch",
    "architectures",
    default=",".join(map(str, SHIPPED_ARCHITECTURES)),
    show_default=True,
    callback=_parse_architectures,
    help=_ARCHITECTURES_HELP,
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=KERNELS_FOLDER, help="Target folder.")
@click.option("--compiler", type=click.Choice(["auto", "nvrtc", "nvcc"]), default="auto", show_default=True)
def build(architectures: tuple[int, ...], out: Path, compiler: str) -> None:
    """Compile to one fatbin: machine code for each architecture, PTX for newer ones."""
    try:
        build_kernels(architectures, compiler=compiler, on_progress=click.echo).write(out)
    except KernelBuildError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"wrote {out / FATBIN_NAME}")


@kernels.command()
def check() -> None:
    """Compare the fatbin with its manifest and its sources; compiles nothing."""
    try:
        path = verify_kernels()
    except StaleKernelsError as error:
        raise click.ClickException(str(error)) from error
    manifest = load_manifest()
    built = f"{path.stat().st_size} bytes, {manifest.compiler}, {manifest.describe_architectures()}"
    click.echo(f"{path.name}: {built}: up to date")


@kernels.command()
def show() -> None:
    """Registers, stack and spills of each kernel for each architecture."""
    try:
        manifest = load_manifest()
    except StaleKernelsError as error:
        raise click.ClickException(str(error)) from error
    table = Table(title=f"{manifest.compiler}: registers (stack bytes, spilled bytes)")
    table.add_column("kernel")
    for architecture in manifest.architectures:
        table.add_column(f"sm_{architecture}", justify="right")
    for kernel, found in manifest.resources.items():
        cells = (found[architecture] for architecture in manifest.architectures)
        table.add_row(kernel, *(f"{c.registers} ({c.stack_bytes}, {c.spill_bytes})" for c in cells))
    Console().print(table)
