"""The signed manifest: what a snapshot consists of, and the container file that holds it (see FORMAT.md)."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from typing import Final

import msgspec
from blake3 import blake3

from snapshots.blob_reference import MAX_BLOB_BYTES, BlobRef, validate_blob
from snapshots.block_types import TENSOR_TYPES, count_tensor_bytes, fits_blocks
from snapshots.errors import Incompatible, KeyRingError, ManifestMalformed, SignatureInvalid
from snapshots.keyring import MAC_BYTES, MAX_KEY_ID_BYTES, KeyRing
from snapshots.sections import CompiledKernel, PrefixShape, PrimedPrefix, validate_kernels, validate_prefixes

MAGIC: Final = b"\x89GPSNAP\n"
FORMAT_VERSION: Final = 1
HEADER: Final = struct.Struct("<8sHHI")  # magic, version, key id bytes, body bytes
MAX_BODY_BYTES: Final = 64 * 1024 * 1024
MAX_MANIFEST_BYTES: Final = HEADER.size + MAX_BODY_BYTES + MAX_KEY_ID_BYTES + MAC_BYTES
MAX_TENSORS: Final = 65_536
TENSOR_ALIGNMENT: Final = 64  # bytes; the writer gives 4096, a reader needs 64
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

WEIGHTS: Final = "weights"
GUEST_CWASM: Final = "guest_cwasm"
GUEST_WASM: Final = "guest_wasm"
BLOB_ROLES: Final = (WEIGHTS, GUEST_CWASM, GUEST_WASM)
#: Blobs that a snapshot may have besides.
GUEST_ASSETS: Final = "guest_assets"
PRIMED_PREFIXES: Final = "primed_prefixes"
KERNELS: Final = "kernels"
GUEST_TENSORS: Final = "guest_tensors"
POST_PROCESSOR: Final = "post_processor"
#: Blobs that a worker gets where the snapshot has them, behind weights and compiled guest, in this order.
FURTHER_WORKER_ROLES: Final = (PRIMED_PREFIXES, GUEST_TENSORS, KERNELS, POST_PROCESSOR)
#: Those of which no section of the manifest says that they must be there.
FREE_ROLES: Final = frozenset({GUEST_ASSETS, POST_PROCESSOR})

#: Identity entries that hold a space-separated list of which *here* must have all; every other entry must be equal.
IDENTITY_SUBSET_KEYS: Final = frozenset({"cpu_features"})


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor's place in the weights blob. ``offset`` counts bytes from the start of the blob (file)."""

    name: str
    dtype: str  # one of TENSOR_TYPES
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class SnapshotCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What others need to know of the model without touching its weights."""

    architecture: str
    weight_format: str  # "bf16", "int8", ...
    context_length: int  # tokens
    vocab_size: int  # tokens
    max_token_bytes: int  # the longest token's text
    num_layers: int
    num_kv_heads: int
    head_dim: int
    worker_bytes: int  # private memory to reserve for one worker, KV included
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None


class Programs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The guest's recorded tensor programs, as it wrote them: prefill and decode, or an encoder's encode alone."""

    prefill: bytes = b""
    decode: bytes = b""
    encode: bytes = b""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A snapshot. Immutable; :attr:`snapshot_id` names this exact content.

    ``identity`` says what the compiled guest needs (see :func:`verify_identity`). ``tensor_handles[h]`` is the name
    of the tensor behind handle *h* of the programs; ``tensors`` are in file order. ``prefixes`` and ``kernels`` are
    sections that a snapshot need not have (see sections).
    """

    name: str
    created_at_s: float
    identity: dict[str, str]
    card: SnapshotCard
    blobs: dict[str, BlobRef]
    tensors: tuple[TensorEntry, ...]
    tensor_handles: tuple[str, ...]
    programs: Programs
    prefixes: tuple[PrimedPrefix, ...] = ()
    kernels: tuple[CompiledKernel, ...] = ()
    guest_tensors: tuple[TensorEntry, ...] = ()  # made by the guest at init, in the blob of that role
    vector_size: int = 0  # numbers in an encoder's result; 0: the model generates

    @property
    def snapshot_id(self) -> str:
        """16 hex digits over the canonical body. Costs one encoding: keep it where it is used often."""
        return compute_snapshot_id(encode_body(self))

    @property
    def weights(self) -> BlobRef:
        return self.blobs[WEIGHTS]

    @property
    def guest_cwasm(self) -> BlobRef:
        return self.blobs[GUEST_CWASM]

    @property
    def guest_wasm(self) -> BlobRef:
        return self.blobs[GUEST_WASM]

    @property
    def primed_prefixes(self) -> BlobRef | None:
        return self.blobs.get(PRIMED_PREFIXES)

    @property
    def worker_blobs(self) -> tuple[BlobRef, ...]:
        """What a worker gets, in the order of :attr:`worker_roles`."""
        return tuple(self.blobs[role] for role in self.worker_roles)

    @property
    def worker_roles(self) -> tuple[str, ...]:
        """Roles of the blobs that a worker gets: weights, compiled guest, and what else the snapshot has for it."""
        return (WEIGHTS, GUEST_CWASM, *(role for role in FURTHER_WORKER_ROLES if role in self.blobs))

    @property
    def prefix_shape(self) -> PrefixShape:
        card = self.card
        return PrefixShape(card.num_layers, card.num_kv_heads, card.head_dim, card.vocab_size, card.context_length)


_encoder: Final = msgspec.json.Encoder(order="deterministic")
_decoder: Final = msgspec.json.Decoder(Manifest)


def encode_body(manifest: Manifest) -> bytes:
    """Canonical bytes of a manifest: JSON, fields in schema order, mapping keys sorted, no white space."""
    return _encoder.encode(manifest)


def compute_snapshot_id(body: bytes) -> str:
    """Short id of a canonical body: the first 16 hex digits of its BLAKE3 digest."""
    return blake3(body).hexdigest()[:16]


def seal_manifest(manifest: Manifest, keyring: KeyRing) -> bytes:
    """The signed container file of ``manifest``.

    Raises:
        ManifestMalformed: the manifest contradicts itself or exceeds a cap.
        KeyRingError: no active key.
    """
    validate_manifest(manifest)
    body = encode_body(manifest)
    if len(body) > MAX_BODY_BYTES:
        raise ManifestMalformed(f"body of {len(body)} bytes, at most {MAX_BODY_BYTES}; use larger chunks")
    key_id = keyring.signing_key_id
    if key_id is None:
        raise KeyRingError("no active key to sign with: make one with `glowplug keys new`")
    encoded_id = key_id.encode("ascii")
    signed = HEADER.pack(MAGIC, FORMAT_VERSION, len(encoded_id), len(body)) + body + encoded_id
    return signed + keyring.sign_with(key_id, signed)


def open_manifest(data: bytes, keyring: KeyRing, *, name: str | None) -> Manifest:
    """Verify and parse a container file that was found under ``name`` (None: not under a name, as in transport).

    Order: caps and framing, then the MAC, then the version, then the body. Nothing unauthenticated is parsed.

    Raises:
        ManifestMalformed: framing, caps, or an authentic body that contradicts itself.
        SignatureInvalid: bad MAC, unknown key id, or signed for another name.
        Incompatible: an authentic manifest of a format version we do not read.
    """
    version, body = verify_container(data, keyring)
    if version != FORMAT_VERSION:
        raise Incompatible(
            name or "?", [f"manifest format version {version}, this software reads version {FORMAT_VERSION}"]
        )
    try:
        manifest = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestMalformed(f"manifest body does not follow the schema: {error}") from error
    if encode_body(manifest) != body:
        raise ManifestMalformed("manifest body is not in canonical form")
    validate_manifest(manifest)
    if name is not None and manifest.name != name:
        raise SignatureInvalid(
            f"this manifest is signed for name {manifest.name!r} but was found as {name!r}: "
            "files were renamed or exchanged; build the snapshot under the name it shall have"
        )
    return manifest


def verify_container(data: bytes, keyring: KeyRing) -> tuple[int, bytes]:
    """Framing and MAC of a container file: its format version and body bytes, both authentic.

    Raises:
        ManifestMalformed: too large, too short, wrong magic, lengths that do not add up.
        SignatureInvalid: bad MAC or unknown key id.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestMalformed(f"manifest of {len(data)} bytes, at most {MAX_MANIFEST_BYTES}")
    if len(data) < HEADER.size + MAC_BYTES:
        raise ManifestMalformed(f"manifest of {len(data)} bytes is cut off: at least {HEADER.size + MAC_BYTES}")
    magic, version, key_id_bytes, body_bytes = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ManifestMalformed(f"not a snapshot manifest: starts with {magic!r}, expected {MAGIC!r}")
    if not 0 < key_id_bytes <= MAX_KEY_ID_BYTES or not 0 < body_bytes <= MAX_BODY_BYTES:
        raise ManifestMalformed(
            f"key id of {key_id_bytes} bytes (1 to {MAX_KEY_ID_BYTES}), body of {body_bytes} (1 to {MAX_BODY_BYTES})"
        )
    expected = HEADER.size + body_bytes + key_id_bytes + MAC_BYTES
    if len(data) != expected:
        raise ManifestMalformed(f"manifest of {len(data)} bytes, its header says {expected}: truncated or extended")
    signed, mac = data[:-MAC_BYTES], data[-MAC_BYTES:]
    key_id = signed[-key_id_bytes:].decode("ascii", errors="backslashreplace")
    keyring.verify(key_id, signed, mac)
    return version, signed[HEADER.size : HEADER.size + body_bytes]


def read_key_id(data: bytes) -> str:
    """Id of the key that signed a container file. Requires: the file was verified."""
    key_id_bytes = HEADER.unpack_from(data)[2]
    return data[-MAC_BYTES - key_id_bytes : -MAC_BYTES].decode("ascii", errors="backslashreplace")


def verify_identity(manifest: Manifest, here: Mapping[str, str]) -> None:
    """Refuse a snapshot whose compiled guest was made for another environment than ``here``.

    Entries in IDENTITY_SUBSET_KEYS are lists of which *here* must have all; every other entry must be equal.

    Raises:
        Incompatible: says each difference and how to rebuild.
    """
    differences = []
    for key in sorted(manifest.identity.keys() | here.keys()):
        built, found = manifest.identity.get(key), here.get(key)
        if key in IDENTITY_SUBSET_KEYS and built is not None and found is not None:
            missing = sorted(set(built.split()) - set(found.split()))
            if missing:
                differences.append(f"{key}: needs {' '.join(missing)}, which this machine lacks")
        elif built != found:
            differences.append(f"{key}: built with {built or 'none'}, here is {found or 'none'}")
    if differences:
        raise Incompatible(manifest.name, differences)


def validate_manifest(manifest: Manifest) -> None:
    """Check every invariant that a reader may rely on.

    Raises:
        ManifestMalformed: names the entry at fault.
    """
    if not NAME.fullmatch(manifest.name):
        raise ManifestMalformed(f"name {manifest.name[:140]!r} is not [A-Za-z0-9][A-Za-z0-9._-]{{0,127}}")
    if not math.isfinite(manifest.created_at_s):
        raise ManifestMalformed("created_at_s is not a finite number")
    _validate_roles(manifest)
    for role, ref in manifest.blobs.items():
        validate_blob(role, ref)
    sizes = {role: ref.size_bytes for role, ref in manifest.blobs.items()}
    names: set[str] = set()
    _validate_tensors(manifest.tensors, "weights", manifest.weights.size_bytes, names)
    _validate_tensors(manifest.guest_tensors, "guest tensors", sizes.get(GUEST_TENSORS, 0), names)
    _validate_handles(manifest)
    if manifest.vector_size < 0 or (manifest.vector_size > 0) != bool(manifest.programs.encode):
        raise ManifestMalformed(
            f"vector_size is {manifest.vector_size}, and the encode program has {len(manifest.programs.encode)} bytes: "
            "an encoder has both, any other model neither"
        )
    card = manifest.card
    for field in ("context_length", "vocab_size", "num_layers", "num_kv_heads", "head_dim"):
        if getattr(card, field) <= 0:
            raise ManifestMalformed(f"card.{field} is {getattr(card, field)}, expected a positive number")
    if card.worker_bytes < 0 or card.max_token_bytes < 0:
        raise ManifestMalformed("card.worker_bytes and card.max_token_bytes must not be negative")
    validate_prefixes(manifest.prefixes, manifest.prefix_shape, sizes.get(PRIMED_PREFIXES, 0))
    validate_kernels(manifest.kernels, sizes.get(KERNELS, 0))


def _validate_roles(manifest: Manifest) -> None:
    """A section's blob is there when the section is, and only then."""
    expected = set(BLOB_ROLES)
    expected |= {PRIMED_PREFIXES} if manifest.prefixes else set()
    expected |= {KERNELS} if manifest.kernels else set()
    expected |= {GUEST_TENSORS} if manifest.guest_tensors else set()
    if set(manifest.blobs) - FREE_ROLES != expected:
        raise ManifestMalformed(
            f"blobs are {sorted(manifest.blobs)}, expected {sorted(expected)} and perhaps {sorted(FREE_ROLES)}"
        )


def _validate_tensors(tensors: tuple[TensorEntry, ...], blob: str, blob_bytes: int, names: set[str]) -> None:
    """Check ``tensors`` of one blob; their names join ``names``, in which none may be yet."""
    if len(tensors) > MAX_TENSORS:
        raise ManifestMalformed(f"{len(tensors)} tensors, at most {MAX_TENSORS}")
    free_from = 0
    for tensor in tensors:
        label = f"tensor {tensor.name[:80]!r}"
        if not 0 < len(tensor.name) <= 256 or tensor.name in names:
            raise ManifestMalformed(f"{label}: names must be unique and have 1 to 256 characters")
        names.add(tensor.name)
        if tensor.dtype not in TENSOR_TYPES:
            raise ManifestMalformed(f"{label}: dtype {tensor.dtype[:20]!r}, expected one of {sorted(TENSOR_TYPES)}")
        if not 0 < len(tensor.shape) <= 8 or any(not 0 < size <= MAX_BLOB_BYTES for size in tensor.shape):
            raise ManifestMalformed(f"{label}: shape {tensor.shape[:8]}, expected 1 to 8 positive sizes")
        if not fits_blocks(tensor.dtype, tensor.shape):
            raise ManifestMalformed(f"{label}: shape {tensor.shape} is no matrix of whole {tensor.dtype} blocks")
        if count_tensor_bytes(tensor.dtype, tensor.shape) != tensor.size_bytes:
            raise ManifestMalformed(f"{label}: {tensor.size_bytes} bytes do not fit shape {tensor.shape}")
        if tensor.offset % TENSOR_ALIGNMENT or tensor.offset < free_from:
            raise ManifestMalformed(
                f"{label}: offset {tensor.offset} must be a multiple of {TENSOR_ALIGNMENT} "
                f"and not before {free_from}, where the tensor before it ends"
            )
        free_from = tensor.offset + tensor.size_bytes
        if free_from > blob_bytes:
            raise ManifestMalformed(f"{label}: ends at byte {free_from} of a {blob_bytes}-byte {blob} blob")


def _validate_handles(manifest: Manifest) -> None:
    names = {tensor.name for tensor in (*manifest.tensors, *manifest.guest_tensors)}
    if len(set(manifest.tensor_handles)) != len(manifest.tensor_handles):
        raise ManifestMalformed("tensor_handles name a tensor twice")
    unknown = [name for name in manifest.tensor_handles if name not in names]
    if unknown:
        raise ManifestMalformed(f"tensor_handles name tensors that do not exist: {unknown[:3]}")
