"""A small synthetic snapshot, and what its tests share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snapshots import chunks
from snapshots.blob_reference import BlobRef
from snapshots.key_file import Key
from snapshots.keyring import KeyRing
from snapshots.manifest import GUEST_CWASM, GUEST_WASM, WEIGHTS, Manifest, Programs, SnapshotCard
from snapshots.rollback import NewestSeen
from snapshots.store import SnapshotStore
from snapshots.weights_file import TensorSpec, plan_weights, write_weights

CHUNK_BYTES = 64 * 1024
IDENTITY = {"wasmtime": "50.0.0", "target": "x86_64-unknown-linux-gnu", "cpu_features": "has_sse3 has_popcnt"}
SPECS = (
    TensorSpec("embed.weight", "BF16", (512, 96)),
    TensorSpec("layers.0.attn_norm.weight", "F32", (96,)),
    TensorSpec("layers.0.qkv.weight", "I8", (288, 96)),
    TensorSpec("layers.0.qkv.weight_scale", "F32", (288,)),
)


def make_key(key_id: str = "test-1", byte: int = 0x5A) -> Key:
    """A fixed key; only for tests."""
    return Key(key_id, bytes([byte]) * 32, "2026-01-01T00:00:00Z", "active")


def make_encryption_key(key_id: str = "e-test", byte: int = 0xC3) -> Key:
    """A fixed key that encrypts; only for tests."""
    return Key(key_id, bytes([byte]) * 32, "2026-01-01T00:00:00Z", "encrypt")


def make_keyring() -> KeyRing:
    """A ring with one fixed key."""
    return KeyRing([make_key()])


def make_card(**changes: object) -> SnapshotCard:
    """A card with plausible figures."""
    fields: dict[str, object] = {
        "architecture": "llama",
        "weight_format": "bf16",
        "context_length": 2048,
        "vocab_size": 512,
        "max_token_bytes": 16,
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_dim": 96,
        "worker_bytes": 1 << 20,
        "eos_token_ids": (2,),
        "chat_template": "{{ messages }}",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    return SnapshotCard(**{**fields, **changes})  # type: ignore[arg-type]  # tests pass deliberately wrong values too


@dataclass(frozen=True)
class SyntheticSnapshot:
    """A snapshot of pseudo-random bytes in a real store."""

    store: SnapshotStore
    keyring: KeyRing
    manifest: Manifest
    tensors: tuple[np.ndarray, ...]

    @property
    def manifest_path(self) -> Path:
        return self.store.root / "manifests" / f"{self.manifest.name}.gpsnap"

    def path_of(self, role: str) -> Path:
        return self.store.blob_path(self.manifest.blobs[role])


def make_tensors(seed: int = 7) -> tuple[np.ndarray, ...]:
    """Arrays of the sizes in SPECS, filled with pseudo-random bytes."""
    random = np.random.default_rng(seed)
    return tuple(np.frombuffer(random.bytes(spec.size_bytes), np.uint8) for spec in SPECS)


def build_snapshot(
    root: Path,
    name: str = "tiny",
    *,
    seed: int = 7,
    created_at_s: float = 1_790_000_000.5,
    keyring: KeyRing | None = None,
    encrypt: bool = False,
    with_verity: bool = False,
    newest: NewestSeen | None = None,
    identity: dict[str, str] = IDENTITY,
    guest_wasm: bytes | None = None,
) -> SyntheticSnapshot:
    """Write a complete snapshot into a store at ``root``. Its bytes are random, unless ``guest_wasm`` are given."""
    store, random = SnapshotStore(root, newest=newest), np.random.default_rng(seed + 1)
    keyring = keyring or make_keyring()
    encrypt_with = keyring if encrypt else None
    tensors = make_tensors(seed)
    layout = plan_weights(SPECS)

    def add(data: bytes) -> BlobRef:
        return store.add_blob_bytes(data, chunk_bytes=CHUNK_BYTES, encrypt_with=encrypt_with, with_verity=with_verity)

    with store.add_blob(chunk_bytes=CHUNK_BYTES, encrypt_with=encrypt_with, with_verity=with_verity) as writer:
        write_weights(writer, layout, tensors)
    manifest = Manifest(
        name=name,
        created_at_s=created_at_s,
        identity=identity,
        card=make_card(),
        blobs={
            WEIGHTS: writer.ref,
            GUEST_CWASM: add(random.bytes(100_000)),
            GUEST_WASM: add(random.bytes(5_000) if guest_wasm is None else guest_wasm),
        },
        tensors=layout.entries,
        tensor_handles=("layers.0.qkv.weight", "embed.weight", "layers.0.attn_norm.weight"),
        programs=Programs(prefill=b"GPRG-prefill", decode=b"GPRG-decode"),
    )
    store.write_manifest(manifest, keyring)
    return SyntheticSnapshot(store, keyring, manifest, tensors)


def flip_byte(path: Path, position: int, mask: int = 0x01) -> None:
    """Change bits of one byte in place, whatever the file's mode says."""
    path.chmod(0o644)
    fd = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, position)[0]
        os.pwrite(fd, bytes([byte ^ mask]), position)
    finally:
        os.close(fd)


def blob_ref(data: bytes, chunk_bytes: int = CHUNK_BYTES) -> BlobRef:
    """The reference that a store would give ``data``."""
    digests = chunks.digest_chunks(data, chunk_bytes)
    return BlobRef(chunks.digest_blob(len(data), chunk_bytes, digests), len(data), chunk_bytes, digests)
