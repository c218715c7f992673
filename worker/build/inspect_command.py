"""``glowplug inspect``: what a snapshot consists of. Reads the verified manifest alone, no blob."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Column, Table

from snapshots.manifest import DTYPE_BYTES, FORMAT_VERSION, BlobRef, Manifest, TensorEntry, read_key_id
from worker.build.command_support import errors_exit, key_file_option, open_store_and_keys, state_dir_option

#: Width where the output is no terminal: wide enough that no digest or name is cut.
PLAIN_WIDTH: Final = 160


@click.command("inspect", short_help="Show what a snapshot consists of.")
@click.argument("name")
@state_dir_option
@key_file_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect_command(name: str, state_dir: Path | None, key_file: Path | None, as_json: bool) -> None:
    """Show sections, sizes, identity, signer and tensors of the snapshot NAME. Its signature is verified."""
    with errors_exit():
        store, keyring = open_store_and_keys(state_dir, key_file)
        manifest, container = store.read_signed(name, keyring)
    description = describe(manifest, container)
    if as_json:
        click.echo(json.dumps(description, indent=2))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    _print(console, description)


def describe(manifest: Manifest, container: bytes) -> dict[str, Any]:
    """A snapshot as plain values, ready for JSON. Requires: ``container`` was verified to hold ``manifest``."""
    card = manifest.card
    handles = {name: handle for handle, name in enumerate(manifest.tensor_handles)}
    return {
        "name": manifest.name,
        "snapshot_id": manifest.snapshot_id,
        "format_version": FORMAT_VERSION,
        "signer_key_id": read_key_id(container),
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(manifest.created_at_s)),
        "created_at_s": manifest.created_at_s,
        "card": {field: getattr(card, field) for field in card.__struct_fields__},
        "identity": dict(sorted(manifest.identity.items())),
        "sections": [
            {"section": "manifest", "size_bytes": len(container)},
            *({"section": role, **_describe_blob(ref)} for role, ref in sorted(manifest.blobs.items())),
            *(
                {"section": f"program {kind}", "size_bytes": len(getattr(manifest.programs, kind))}
                for kind in manifest.programs.__struct_fields__
                if getattr(manifest.programs, kind)
            ),
        ],
        "num_tensors": len(manifest.tensors),
        "num_parameters": sum(tensor.size_bytes // DTYPE_BYTES[tensor.dtype] for tensor in manifest.tensors),
        "tensors": [_describe_tensor(tensor, handles.get(tensor.name)) for tensor in manifest.tensors],
    }


def _describe_blob(ref: BlobRef) -> dict[str, Any]:
    return {
        "size_bytes": ref.size_bytes,
        "file_bytes": ref.file_bytes,
        "chunk_bytes": ref.chunk_bytes,
        "num_chunks": ref.num_chunks,
        "digest": ref.digest,
        "address": ref.address,
        "encryption_key_id": ref.encryption.key_id if ref.encryption else None,
        "verity_sha256": ref.verity_sha256,
    }


def _describe_tensor(tensor: TensorEntry, handle: int | None) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "offset": tensor.offset,
        "size_bytes": tensor.size_bytes,
        "handle": handle,
    }


def _print(console: Console, description: dict[str, Any]) -> None:
    card = description["card"]
    summary = Table.grid(padding=(0, 2))
    for label, value in (
        ("snapshot", f"{description['name']}  {description['snapshot_id']}"),
        ("created", description["created_at"]),
        ("signed by", description["signer_key_id"]),
        (
            "model",
            f"{card['architecture']}, {card['weight_format']}, {description['num_parameters'] / 1e6:,.1f} M values",
        ),
        ("context", f"{card['context_length']:,} tokens, vocabulary {card['vocab_size']:,}"),
        ("worker", f"{card['worker_bytes'] / 1e6:,.0f} MB of private memory"),
        *((f"needs {key}", value) for key, value in description["identity"].items()),
    ):
        summary.add_row(label, str(value))
    console.print(summary)
    sections = Table(
        "section",
        Column("bytes", justify="right"),
        Column("chunks", justify="right"),
        "digest",
        "at rest",
        title="sections",
    )
    for section in description["sections"]:
        key_id = section.get("encryption_key_id")
        at_rest = f"AES-256-GCM, key {key_id}" if key_id else "plain"
        sections.add_row(
            section["section"],
            f"{section['size_bytes']:,}",
            f"{section['num_chunks']:,}" if "num_chunks" in section else "",
            section.get("digest", "")[:16],
            at_rest if "digest" in section else "",
        )
    console.print(sections)
    tensors = Table(
        Column("handle", justify="right"),
        "tensor",
        "type",
        "shape",
        Column("offset", justify="right"),
        Column("bytes", justify="right"),
        title="tensors",
    )
    for tensor in description["tensors"]:
        handle = "" if tensor["handle"] is None else str(tensor["handle"])
        shape = " x ".join(str(size) for size in tensor["shape"])
        tensors.add_row(
            handle, tensor["name"], tensor["dtype"], shape, f"{tensor['offset']:,}", f"{tensor['size_bytes']:,}"
        )
    console.print(tensors)
