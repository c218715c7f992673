"""``glowplug inspect``: what a snapshot consists of. Reads the verified manifest, and no blob unless asked for text."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from guests.compile import guest_identity
from guests.errors import GuestError
from guests.runtime import GuestEngine
from guests.text import GuestText
from snapshots.blob_reference import BlobRef
from snapshots.keyring import KeyRing
from snapshots.manifest import FORMAT_VERSION, Manifest, TensorEntry, read_key_id, verify_identity
from snapshots.mapping import seal_blob
from snapshots.store import SnapshotStore
from worker.build.command_support import errors_exit, key_file_option, open_store_and_keys, state_dir_option

#: Width where the output is no terminal: wide enough that no digest or name is cut.
PLAIN_WIDTH: Final = 160
SHOWN_TOKENS: Final = 32  # of a prefix


@click.command("inspect", short_help="Show what a snapshot consists of.")
@click.argument("name")
@state_dir_option
@key_file_option
@click.option("--prefix-text", is_flag=True, help="Show how primed prefixes begin: they may be confidential.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect_command(name: str, state_dir: Path | None, key_file: Path | None, prefix_text: bool, as_json: bool) -> None:
    """Show sections, sizes, identity, signer, tensors, primed prefixes and kernels of the snapshot NAME.

    Its signature is verified.
    """
    with errors_exit():
        store, keyring = open_store_and_keys(state_dir, key_file)
        manifest, container = store.read_signed(name, keyring)
        description = describe(manifest, container)
        if prefix_text:
            for shown, text in zip(description["prefixes"], read_prefix_texts(manifest, store, keyring), strict=True):
                shown["text"] = text
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
        "num_parameters": sum(math.prod(tensor.shape) for tensor in manifest.tensors),
        "tensors": [_describe_tensor(tensor, handles.get(tensor.name)) for tensor in manifest.tensors],
        "guest_tensors": [_describe_tensor(tensor, handles.get(tensor.name)) for tensor in manifest.guest_tensors],
        "prefixes": [
            {"tokens": prefix.num_tokens, "size_bytes": prefix.size_bytes, "computed_with": prefix.computed_with}
            for prefix in manifest.prefixes
        ],
        "kernels": [
            {field: getattr(kernel, field) for field in ("name", "architecture", "size_bytes", "digest")}
            for kernel in manifest.kernels
        ],
    }


def read_prefix_texts(manifest: Manifest, store: SnapshotStore, keyring: KeyRing) -> list[str]:
    """The first characters of each primed prefix, as the snapshot's own guest writes its tokens.

    Raises:
        SnapshotError: the guest's blob does not verify, or was compiled for another machine.
        click.ClickException: the guest fails.
    """
    verify_identity(manifest, guest_identity())
    ref = manifest.guest_cwasm
    sealed = seal_blob(store.blob_path(ref), ref, keyring=keyring)
    try:
        with GuestEngine() as engine:
            engine.start_ticker()
            text = GuestText(engine.load(f"/proc/self/fd/{sealed.fd}"), seed=0)
            try:
                return [
                    text.detokenize(list(prefix.unpack_token_ids()[:SHOWN_TOKENS]), show_special=True)
                    for prefix in manifest.prefixes
                ]
            finally:
                text.close()
    except GuestError as error:
        raise click.ClickException(f"the snapshot's guest cannot write its prefixes: {error}") from error
    finally:
        os.close(sealed.fd)


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
    _print_prefixes(console, description["prefixes"])
    _print_kernels(console, description["kernels"])
    tensors = Table(
        Column("handle", justify="right"),
        "tensor",
        "type",
        "shape",
        Column("offset", justify="right"),
        Column("bytes", justify="right"),
        title="tensors",
    )
    for tensor in [*description["tensors"], *description["guest_tensors"]]:
        handle = "" if tensor["handle"] is None else str(tensor["handle"])
        shape = " x ".join(str(size) for size in tensor["shape"])
        tensors.add_row(
            handle, tensor["name"], tensor["dtype"], shape, f"{tensor['offset']:,}", f"{tensor['size_bytes']:,}"
        )
    console.print(tensors)


def _print_prefixes(console: Console, prefixes: list[dict[str, Any]]) -> None:
    if not prefixes:
        return
    table = Table(
        Column("tokens", justify="right"), Column("bytes", justify="right"), "computed with", title="primed prefixes"
    )
    has_text = "text" in prefixes[0]
    if has_text:
        table.add_column("begins with")
    for prefix in prefixes:
        begins = [Text(repr(prefix["text"])[1:-1])] if has_text else []  # no markup, no control characters
        table.add_row(f"{prefix['tokens']:,}", f"{prefix['size_bytes']:,}", prefix["computed_with"], *begins)
    console.print(table)


def _print_kernels(console: Console, kernels: list[dict[str, Any]]) -> None:
    if not kernels:
        return
    table = Table("kernel", "architecture", Column("bytes", justify="right"), "digest", title="kernels")
    for kernel in kernels:
        table.add_row(kernel["name"], kernel["architecture"], f"{kernel['size_bytes']:,}", kernel["digest"][:16])
    console.print(table)
