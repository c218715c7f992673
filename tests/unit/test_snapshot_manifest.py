"""The container file and the manifest's own rules."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import math
import struct
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshots.blob_reference import BlobRef
from snapshots.errors import Incompatible, KeyRingError, ManifestMalformed, SignatureInvalid, SnapshotError
from snapshots.keyring import KeyRing
from snapshots.manifest import (
    GUEST_CWASM,
    GUEST_WASM,
    HEADER,
    MAGIC,
    MAX_BODY_BYTES,
    MAX_MANIFEST_BYTES,
    WEIGHTS,
    Manifest,
    Programs,
    TensorEntry,
    encode_body,
    open_manifest,
    seal_manifest,
    validate_manifest,
    verify_identity,
)
from tests.snapshot_fixtures import blob_ref, make_card, make_key, make_keyring

# Format version 1, byte for byte. These change only together with FORMAT_VERSION.
GOLDEN_HEADER = bytes.fromhex("894750534e41500a01000600aa040000")
GOLDEN_BODY = (
    b'{"name":"golden","created_at_s":1790000000.25,'
    b'"identity":{"cpu_features":"has_popcnt","wasmtime":"50.0.0"},'
    b'"card":{"architecture":"llama","weight_format":"bf16","context_length":2048,"vocab_size":512,'
    b'"max_token_bytes":16,"num_layers":1,"num_kv_heads":1,"head_dim":96,"worker_bytes":1048576,'
    b'"eos_token_ids":[2],"chat_template":"{{ messages }}","bos_token":"<s>","eos_token":"</s>"},'
    b'"blobs":{"guest_cwasm":{"digest":"b333c3ecf56526ac560483f78ee378e1004b77ba63d6566b99de0bb94529845f",'
    b'"size_bytes":11,"chunk_bytes":65536,"chunk_digests":"gMynXFT83qgQrBfViKmIa06B3t3mdQKKm/+JLV4VUFM="},'
    b'"guest_wasm":{"digest":"48d67e269ffaadffef8d0c95e5cafac235ecfc7e48fca75bc4d769dee0938ee3",'
    b'"size_bytes":4,"chunk_bytes":65536,"chunk_digests":"AD5u6FswuSFSA279l0yaOQfGVjXsGQwFoImxgKV9wDo="},'
    b'"weights":{"digest":"86856d77aa7702e69eda85595d4a437a3c27fc268355ec1ba16abfe76e6dde5b",'
    b'"size_bytes":76800,"chunk_bytes":65536,"chunk_digests":'
    b'"8WyfhnzFOExzKapEgeumUYxQqyG/imFeJrrVXldWmywy+W+s51bodNlgBL7VNrzVkAiIFdTl79fHsyFIwbTjZg=="}},'
    b'"tensors":[{"name":"embed.weight","dtype":"BF16","shape":[4,32],"offset":4096,"size_bytes":256}],'
    b'"tensor_handles":["embed.weight"],"programs":{"prefill":"cHJlZmlsbA==","decode":"ZGVjb2Rl"}}'
)
GOLDEN_KEY_ID = b"test-1"
GOLDEN_MAC = bytes.fromhex("cb1cebad707c4b876780b88c82233ad4bbdfdaaa49c9822f5df430411b6d2f6d")
GOLDEN_FILE = GOLDEN_HEADER + GOLDEN_BODY + GOLDEN_KEY_ID + GOLDEN_MAC
GOLDEN_SNAPSHOT_ID = "3d1e054cbbf3f751"


def make_manifest(**changes: Any) -> Manifest:
    """The manifest of the golden file, with changes."""
    fields: dict[str, Any] = {
        "name": "golden",
        "created_at_s": 1_790_000_000.25,
        "identity": {"wasmtime": "50.0.0", "cpu_features": "has_popcnt"},
        "card": make_card(),
        "blobs": {
            WEIGHTS: blob_ref(bytes(range(256)) * 300),
            GUEST_CWASM: blob_ref(b"native code"),
            GUEST_WASM: blob_ref(b"\0asm"),
        },
        "tensors": (TensorEntry("embed.weight", "BF16", (4, 32), 4096, 256),),
        "tensor_handles": ("embed.weight",),
        "programs": Programs(b"prefill", b"decode"),
    }
    return Manifest(**{**fields, **changes})


def sign_container(body: bytes, *, version: int = 1, key_id: bytes = b"test-1") -> bytes:
    """An authentic container around any body: what only a holder of the key could make."""
    signed = struct.pack("<8sHHI", MAGIC, version, len(key_id), len(body)) + body + key_id
    return signed + hmac.digest(make_key().secret, signed, hashlib.sha256)


def test_container_bytes_are_the_golden_ones() -> None:
    """Writing gives exactly the bytes of format version 1, so old files stay readable and ids stay the same."""
    assert seal_manifest(make_manifest(), make_keyring()) == GOLDEN_FILE
    assert make_manifest().snapshot_id == GOLDEN_SNAPSHOT_ID


def test_golden_file_reads_back() -> None:
    """The golden bytes give the manifest they were made from."""
    assert open_manifest(GOLDEN_FILE, make_keyring(), name="golden") == make_manifest()


def test_mac_is_plain_hmac_sha256_of_everything_before_it() -> None:
    """Any other implementation can check the signature with a standard HMAC."""
    assert hmac.digest(make_key().secret, GOLDEN_FILE[:-32], "sha256") == GOLDEN_MAC


def test_mapping_order_does_not_change_the_bytes() -> None:
    """Canonical: dictionaries built in another order encode the same."""
    manifest = make_manifest()
    turned = make_manifest(
        identity=dict(reversed(manifest.identity.items())), blobs=dict(reversed(manifest.blobs.items()))
    )
    assert encode_body(turned) == encode_body(manifest)


def test_every_single_bit_of_the_golden_file_matters() -> None:
    """One flipped bit anywhere in the file is refused."""
    keyring = make_keyring()
    for position in range(len(GOLDEN_FILE)):
        changed = bytearray(GOLDEN_FILE)
        changed[position] ^= 1 << position % 8
        with pytest.raises((SignatureInvalid, ManifestMalformed)):
            open_manifest(bytes(changed), keyring, name="golden")


def test_every_truncation_is_refused() -> None:
    """A file that was cut anywhere is refused for its framing, before anything is hashed."""
    keyring = make_keyring()
    for length in range(len(GOLDEN_FILE)):
        with pytest.raises(ManifestMalformed):
            open_manifest(GOLDEN_FILE[:length], keyring, name="golden")


def test_extension_is_refused() -> None:
    """Bytes after the signature are refused."""
    with pytest.raises(ManifestMalformed, match="extended"):
        open_manifest(GOLDEN_FILE + b"\0", make_keyring(), name="golden")


def test_other_key_with_the_same_id_is_refused() -> None:
    """A forger who knows the key id, but not the key, is refused."""
    with pytest.raises(SignatureInvalid, match="does not match"):
        open_manifest(GOLDEN_FILE, KeyRing([make_key(byte=0x5B)]), name="golden")


def test_unknown_key_id_is_named() -> None:
    """The error says which key is missing and which ones there are."""
    with pytest.raises(SignatureInvalid, match=r"'test-1'.*other-key"):
        open_manifest(GOLDEN_FILE, KeyRing([make_key("other-key")]), name="golden")


def test_manifest_under_another_name_is_refused() -> None:
    """A signed manifest cannot be passed off as another model."""
    with pytest.raises(SignatureInvalid, match=r"'golden'.*'other'"):
        open_manifest(GOLDEN_FILE, make_keyring(), name="other")


def test_authentic_unknown_version_is_named() -> None:
    """A newer format is refused as such, with both version numbers."""
    with pytest.raises(Incompatible, match=r"version 2, this software reads version 1"):
        open_manifest(sign_container(GOLDEN_BODY, version=2), make_keyring(), name="golden")


def test_oversized_file_is_refused_before_parsing() -> None:
    """The cap holds for the file and for the length that its header claims."""
    with pytest.raises(ManifestMalformed, match="at most"):
        open_manifest(bytes(MAX_MANIFEST_BYTES + 1), make_keyring(), name="golden")
    claims = HEADER.pack(MAGIC, 1, 6, MAX_BODY_BYTES + 1) + bytes(64)
    with pytest.raises(ManifestMalformed, match="1 to"):
        open_manifest(claims, make_keyring(), name="golden")


@dataclass(frozen=True)
class BadBody:
    """An authentic body that must still be refused."""

    why: str
    body: bytes


BAD_BODIES = [
    BadBody("not JSON", b"\xff\xfe"),
    BadBody("another type", b"[]"),
    BadBody("white space", GOLDEN_BODY.replace(b'":', b'": ', 1)),
    BadBody("unknown field", GOLDEN_BODY[:-1] + b',"extra":1}'),
    BadBody("missing field", GOLDEN_BODY.replace(b'"tensor_handles":["embed.weight"],', b"")),
    BadBody("field twice", GOLDEN_BODY[:-1] + b',"name":"golden"}'),
    BadBody("other field order", b'{"created_at_s":1790000000.25,"name":"golden",' + GOLDEN_BODY[46:]),
    BadBody("deep nesting", b"[" * 100_000),
    BadBody("number out of range", GOLDEN_BODY.replace(b'"size_bytes":11', b'"size_bytes":1e400')),
]


@pytest.mark.parametrize("case", BAD_BODIES, ids=lambda case: case.why)
def test_authentic_but_malformed_bodies_are_refused(case: BadBody) -> None:
    """Even a signed body must follow the schema in its one canonical form."""
    assert case.body != GOLDEN_BODY
    with pytest.raises(ManifestMalformed):
        open_manifest(sign_container(case.body), make_keyring(), name="golden")


BLOB = blob_ref(b"x" * 100_000)
TENSOR = TensorEntry("t", "F32", (64,), 0, 256)
CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "name with a slash": {"name": "../golden"},
    "name with a newline": {"name": "golden\n"},
    "empty name": {"name": ""},
    "long name": {"name": "a" * 129},
    "time not finite": {"created_at_s": math.inf},
    "blob missing": {"blobs": {WEIGHTS: BLOB}},
    "blob unknown": {"blobs": {**make_manifest().blobs, "more": BLOB}},
    "empty blob": {"blobs": {**make_manifest().blobs, WEIGHTS: blob_ref(b"")}},
    "wrong digest": {"blobs": {**make_manifest().blobs, WEIGHTS: msgspec.structs.replace(BLOB, digest="0" * 64)}},
    "wrong size": {"blobs": {**make_manifest().blobs, WEIGHTS: msgspec.structs.replace(BLOB, size_bytes=99_999)}},
    "chunk size": {"blobs": {**make_manifest().blobs, WEIGHTS: BlobRef("0" * 64, 100, 100_000, bytes(32))}},
    "chunk size zero": {"blobs": {**make_manifest().blobs, WEIGHTS: BlobRef("0" * 64, 100, 0, bytes(32))}},
    "too few chunk digests": {
        "blobs": {**make_manifest().blobs, WEIGHTS: msgspec.structs.replace(BLOB, chunk_digests=bytes(32))}
    },
    "tensor twice": {"tensors": (TENSOR, msgspec.structs.replace(TENSOR, offset=256)), "tensor_handles": ()},
    "tensors overlap": {"tensors": (TENSOR, TensorEntry("u", "F32", (64,), 192, 256)), "tensor_handles": ()},
    "tensor not aligned": {"tensors": (msgspec.structs.replace(TENSOR, offset=4),), "tensor_handles": ()},
    "tensor size": {"tensors": (msgspec.structs.replace(TENSOR, size_bytes=255),), "tensor_handles": ()},
    "tensor outside": {"tensors": (msgspec.structs.replace(TENSOR, offset=1 << 30),), "tensor_handles": ()},
    "tensor before the start": {"tensors": (msgspec.structs.replace(TENSOR, offset=-64),), "tensor_handles": ()},
    "tensor dtype": {"tensors": (msgspec.structs.replace(TENSOR, dtype="C64"),), "tensor_handles": ()},
    "tensor shape": {"tensors": (TensorEntry("t", "F32", (-8, -8), 0, 256),), "tensor_handles": ()},
    "handle unknown": {"tensor_handles": ("nothing",)},
    "handle twice": {"tensor_handles": ("embed.weight", "embed.weight")},
    "card without context": {"card": make_card(context_length=0)},
    "card with negative memory": {"card": make_card(worker_bytes=-1)},
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused_on_both_sides(case: str) -> None:
    """What a reader may rely on is checked when writing and, were it signed all the same, when reading."""
    manifest = make_manifest(**CONTRADICTIONS[case])
    with pytest.raises(ManifestMalformed):
        seal_manifest(manifest, make_keyring())
    with pytest.raises(ManifestMalformed):
        open_manifest(sign_container(encode_body(manifest)), make_keyring(), name="golden")


def test_ring_without_active_key_cannot_sign() -> None:
    """Keys that were rotated out verify, but sign nothing new."""
    retired = KeyRing([dataclasses.replace(make_key(), status="verify")])
    assert open_manifest(GOLDEN_FILE, retired, name="golden").name == "golden"
    with pytest.raises(KeyRingError, match="glowplug keys new"):
        seal_manifest(make_manifest(), retired)


def test_identity_differences_are_all_named_with_the_remedy() -> None:
    """A mismatch says what differs, both values, and the command to rebuild."""
    here = {"wasmtime": "51.0.0", "cpu_features": "", "target": "aarch64"}
    with pytest.raises(Incompatible) as caught:
        verify_identity(make_manifest(), here)
    message = str(caught.value)
    assert len(caught.value.differences) == 3
    assert "built with 50.0.0, here is 51.0.0" in message
    assert "needs has_popcnt" in message
    assert "glowplug build SOURCE --name golden" in message


def test_more_cpu_features_than_needed_are_fine() -> None:
    """A newer CPU runs an older snapshot."""
    verify_identity(make_manifest(), {"wasmtime": "50.0.0", "cpu_features": "has_avx2 has_popcnt"})


@given(st.binary(max_size=300))
def test_arbitrary_bytes_give_our_own_error(data: bytes) -> None:
    """No input makes the reader fail in any way but its own errors."""
    with pytest.raises(SnapshotError):
        open_manifest(data, make_keyring(), name="golden")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELD_PATHS = [(field,) for field in msgspec.json.decode(GOLDEN_BODY)] + [
    ("card", "context_length"),
    ("blobs", "weights"),
    ("blobs", "weights", "chunk_bytes"),
    ("blobs", "weights", "chunk_digests"),
    ("tensors", 0, "shape"),
    ("tensors", 0, "offset"),
    ("programs", "decode"),
]


@settings(max_examples=150)
@given(st.sampled_from(FIELD_PATHS), json_values)
def test_any_value_in_any_signed_field_gives_a_manifest_or_our_own_error(path: tuple[Any, ...], value: Any) -> None:
    """The parser behind the signature is robust, too: a value, or a refusal that says why."""
    body = msgspec.json.decode(GOLDEN_BODY)
    place = body
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    try:
        manifest = open_manifest(sign_container(msgspec.json.encode(body)), make_keyring(), name="golden")
    except SnapshotError:
        return
    validate_manifest(manifest)
