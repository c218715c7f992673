"""Optional sections of a manifest: absent where empty, bound to their blobs, refused when malformed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshots.errors import ManifestMalformed
from snapshots.manifest import (
    GUEST_ASSETS,
    KERNELS,
    PRIMED_PREFIXES,
    Manifest,
    encode_body,
    open_manifest,
    seal_manifest,
    validate_manifest,
)
from snapshots.sections import (
    MAX_KERNELS,
    MAX_PREFIXES,
    SECTION_ALIGNMENT,
    CompiledKernel,
    PrefixShape,
    fill_up,
    pack_token_ids,
    plan_prefixes,
    validate_prefixes,
)
from tests.snapshot_fixtures import blob_ref, build_snapshot, make_keyring

DIGEST = "ab" * 32
CARD_SHAPE = PrefixShape(num_layers=1, num_kv_heads=1, head_dim=96, vocab_size=512, context_length=2048)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A manifest without optional sections."""
    return build_snapshot(Path(tmp_path_factory.mktemp("store"))).manifest


def with_prefixes(plain: Manifest, *token_ids: tuple[int, ...]) -> Manifest:
    """``plain`` with prefixes of these tokens."""
    entries = plan_prefixes(token_ids, plain.prefix_shape, "numkong")
    size_bytes = entries[-1].offset + entries[-1].size_bytes
    blobs = {**plain.blobs, PRIMED_PREFIXES: blob_ref(bytes(size_bytes + len(fill_up(size_bytes))))}
    return msgspec.structs.replace(plain, blobs=blobs, prefixes=tuple(entries))


def with_kernels(plain: Manifest, *kernels: CompiledKernel, blob_bytes: int = 3 * SECTION_ALIGNMENT) -> Manifest:
    """``plain`` with compiled kernels."""
    return msgspec.structs.replace(plain, blobs={**plain.blobs, KERNELS: blob_ref(bytes(blob_bytes))}, kernels=kernels)


def kernel(**changes: Any) -> CompiledKernel:
    """A kernel that is in order, but for ``changes``."""
    fields: dict[str, Any] = {
        "name": "rms_norm", "architecture": "sm_90", "digest": DIGEST, "offset": 0, "size_bytes": 100,
    }  # fmt: skip
    return CompiledKernel(**{**fields, **changes})


def test_manifest_without_sections_says_nothing_of_them(plain: Manifest) -> None:
    """Nothing of them is in the canonical body, so that a snapshot without them reads as it always did."""
    body = encode_body(plain)
    assert b'"prefixes"' not in body
    assert b'"kernels"' not in body


def test_sections_survive_signing(plain: Manifest) -> None:
    """Prefixes, kernels and the assets' blob are read back as they were signed."""
    keyring = make_keyring()
    full = with_kernels(with_prefixes(plain, (1, 2, 3), (1, 2, 4, 5)), kernel(), kernel(name="rope", offset=4096))
    full = msgspec.structs.replace(full, blobs={**full.blobs, GUEST_ASSETS: blob_ref(b"assets")})
    found = open_manifest(seal_manifest(full, keyring), keyring, name=full.name)
    assert found == full
    assert [prefix.unpack_token_ids() for prefix in found.prefixes] == [(1, 2, 3), (1, 2, 4, 5)]
    assert found.worker_blobs == (full.weights, full.guest_cwasm, full.blobs[PRIMED_PREFIXES], full.blobs[KERNELS])


def test_section_and_blob_come_together(plain: Manifest) -> None:
    """A blob without its section, a section without its blob, and an unknown role are refused."""
    primed, compiled = with_prefixes(plain, (1, 2, 3)), with_kernels(plain, kernel())
    for broken in (
        msgspec.structs.replace(primed, blobs=plain.blobs),
        msgspec.structs.replace(primed, prefixes=()),
        msgspec.structs.replace(compiled, blobs=plain.blobs),
        msgspec.structs.replace(compiled, kernels=()),
        msgspec.structs.replace(plain, blobs={**plain.blobs, "secrets": blob_ref(b"x")}),
    ):
        with pytest.raises(ManifestMalformed, match="blobs are"):
            validate_manifest(broken)


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        ([kernel(name="")], "not a kernel's name"),
        ([kernel(name="rms norm")], "not a kernel's name"),
        ([kernel(architecture="SM 90")], "not a kernel's name"),
        ([kernel(digest="AB" * 32)], "digest"),
        ([kernel(digest="ab")], "digest"),
        ([kernel(offset=64)], "multiple of 4096"),
        ([kernel(offset=-4096)], "multiple of 4096"),
        ([kernel(size_bytes=0)], "multiple of 4096"),
        ([kernel(size_bytes=1 << 40)], "ends at byte"),
        ([kernel(), kernel(offset=4096)], "twice"),
        ([kernel(), kernel(architecture="sm_80")], "not before 100"),
        ([kernel(name=f"k{i}") for i in range(MAX_KERNELS + 1)], "at most"),
    ],
)
def test_malformed_kernels_are_refused(plain: Manifest, kernels: list[CompiledKernel], words: str) -> None:
    """Names, architectures, digests and places are checked though no kernel is built today."""
    with pytest.raises(ManifestMalformed, match=words):
        validate_manifest(with_kernels(plain, *kernels))


def test_kernels_of_two_architectures_stand_side_by_side(plain: Manifest) -> None:
    """One kernel may be there for several architectures."""
    validate_manifest(with_kernels(plain, kernel(), kernel(architecture="sm_80", offset=4096)))


def test_too_many_and_repeated_prefixes_are_refused(plain: Manifest) -> None:
    """At most 64 prefixes, each of other tokens, each shorter than the context."""
    for token_ids, words in (
        ([(i,) for i in range(MAX_PREFIXES + 1)], "at most 64"),
        ([(1, 2), (1, 2)], "twice"),
        ([(1,) * 2048], "expected 1 to 2047"),
    ):
        with pytest.raises(ManifestMalformed, match=words):
            validate_manifest(with_prefixes(plain, *token_ids))


@given(st.lists(st.lists(st.integers(0, 511), min_size=1, max_size=40).map(tuple), min_size=1, max_size=8, unique=True))
def test_planned_prefixes_are_valid_and_disjoint(token_ids: list[tuple[int, ...]]) -> None:
    """Whatever is planned passes the reader's checks: on pages, in order, not overlapping, in the blob."""
    entries = plan_prefixes(token_ids, CARD_SHAPE, "numpy")
    end = entries[-1].offset + entries[-1].size_bytes
    validate_prefixes(entries, CARD_SHAPE, end)
    assert [entry.unpack_token_ids() for entry in entries] == token_ids
    assert [entry.token_ids for entry in entries] == [pack_token_ids(ids) for ids in token_ids]
    with pytest.raises(ManifestMalformed):
        validate_prefixes(entries, CARD_SHAPE, end - 1)
