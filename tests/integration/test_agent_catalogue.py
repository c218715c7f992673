"""The model catalogue over a real store: what is listed, what is refused and why, and what a change on disk does."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from scheduler.contract import codec
from scheduler.contract.errors import ErrorCode
from snapshots.errors import BlobCorrupt
from snapshots.keyring import KeyRing
from snapshots.manifest import WEIGHTS, Manifest
from tests.snapshot_fixtures import IDENTITY, SyntheticSnapshot, build_snapshot, flip_byte, make_key
from worker.model_catalogue import ModelCatalogue


@pytest.fixture
def snapshot(tmp_path: Path) -> SyntheticSnapshot:
    return build_snapshot(tmp_path / "store", "tiny")


@pytest.fixture
def catalogue(snapshot: SyntheticSnapshot) -> ModelCatalogue:
    return ModelCatalogue(snapshot.store, snapshot.keyring, IDENTITY)


def test_verified_snapshot_gets_a_card_with_what_others_need(
    snapshot: SyntheticSnapshot, catalogue: ModelCatalogue
) -> None:
    """The card repeats the signed facts, and what a worker is given decodes to the verified manifest."""
    change = catalogue.scan()
    (card,) = change.changed
    assert (card.name, card.snapshot_id) == ("tiny", snapshot.manifest.snapshot_id)
    assert card.weights_bytes == snapshot.manifest.weights.size_bytes
    assert card.context_length == snapshot.manifest.card.context_length
    assert card.refused is None
    entry = catalogue.get("tiny")
    assert entry is not None
    assert codec.decode(entry.encoded_manifest, Manifest) == snapshot.manifest
    assert not change.security_events


def test_scan_without_news_changes_nothing(catalogue: ModelCatalogue) -> None:
    """A second look at an unchanged store reports no change."""
    assert catalogue.scan()
    assert not catalogue.scan()


def test_removed_and_rebuilt_snapshots_are_noticed(snapshot: SyntheticSnapshot, catalogue: ModelCatalogue) -> None:
    """A manifest that was replaced gives a new card, one that is gone takes its card away."""
    catalogue.scan()
    newer = msgspec.structs.replace(snapshot.manifest, created_at_s=snapshot.manifest.created_at_s + 1)
    snapshot.store.write_manifest(newer, snapshot.keyring)
    (card,) = catalogue.scan().changed
    assert card.snapshot_id == newer.snapshot_id
    assert catalogue.snapshot_ids == {"tiny": newer.snapshot_id}
    snapshot.store.remove("tiny")
    assert catalogue.scan().removed == ["tiny"]
    assert catalogue.cards == []


def test_flipped_bit_in_the_manifest_is_a_refusal_and_an_alarm(
    snapshot: SyntheticSnapshot, catalogue: ModelCatalogue
) -> None:
    """An authentic-looking manifest with a wrong MAC is refused with 403's code; the alarm is raised once."""
    flip_byte(snapshot.manifest_path, 200)
    change = catalogue.scan()
    (card,) = change.changed
    assert card.refused is not None
    assert card.refused.code is ErrorCode.SNAPSHOT_SIGNATURE_INVALID
    assert [event.kind for event in change.security_events] == ["signature_invalid"]
    assert not catalogue.scan().security_events
    assert catalogue.snapshot_ids == {}


def test_unknown_key_is_a_signature_failure(snapshot: SyntheticSnapshot) -> None:
    """A snapshot signed by somebody else's key is refused, whatever it holds."""
    catalogue = ModelCatalogue(snapshot.store, KeyRing([make_key("other", 1)]), IDENTITY)
    (card,) = catalogue.scan().changed
    assert card.refused is not None
    assert card.refused.code is ErrorCode.SNAPSHOT_SIGNATURE_INVALID


def test_truncated_manifest_is_corrupt(snapshot: SyntheticSnapshot, catalogue: ModelCatalogue) -> None:
    """A manifest that is cut off cannot even be authenticated: corrupt, with an alarm."""
    snapshot.manifest_path.chmod(0o644)
    snapshot.manifest_path.write_bytes(snapshot.manifest_path.read_bytes()[:100])
    change = catalogue.scan()
    assert change.changed[0].refused is not None
    assert change.changed[0].refused.code is ErrorCode.SNAPSHOT_CORRUPT
    assert [event.kind for event in change.security_events] == ["manifest_malformed"]


def test_other_environment_is_incompatible_and_no_alarm(snapshot: SyntheticSnapshot) -> None:
    """A snapshot of another Wasmtime says how to rebuild; that is no attack."""
    catalogue = ModelCatalogue(snapshot.store, snapshot.keyring, {**IDENTITY, "wasmtime": "99.0.0"})
    change = catalogue.scan()
    refused = change.changed[0].refused
    assert refused is not None
    assert refused.code is ErrorCode.SNAPSHOT_INCOMPATIBLE
    assert "glowplug build" in refused.message
    assert not change.security_events


def test_corrupt_blob_refuses_the_card_until_a_blob_file_changes(
    snapshot: SyntheticSnapshot, catalogue: ModelCatalogue
) -> None:
    """What sealing found wrong sticks over scans, and is looked at again once the file is another one."""
    catalogue.scan()
    entry = catalogue.get("tiny")
    assert entry is not None
    card, event = catalogue.refuse(entry, BlobCorrupt("weights", "its bytes are not the signed ones"))
    assert card.refused is not None
    assert card.refused.code is ErrorCode.SNAPSHOT_CORRUPT
    assert event is not None
    assert event.kind == "blob_corrupt"
    assert not catalogue.scan()
    path = snapshot.path_of(WEIGHTS)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    (repaired,) = catalogue.scan().changed
    assert repaired.refused is None
