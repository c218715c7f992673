"""A model as a guest records it, out of sealed memory, on the emulated GPU: the logits of the reference backend."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from cuda_device_fixtures import make_device

from guests.runtime import GuestEngine
from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from tests.worker_fixtures import MODEL, copy_state_dir
from worker import agent_sealing
from worker.backends.cuda.cuda_backend import CudaBackend
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import Backend, SequenceInput
from worker.restore import prepare_model
from worker.sealed_cache import SealedCache


async def test_a_restored_model_computes_the_same_on_the_device(tmp_path: Path) -> None:
    """The shipped guest's programs store later results under earlier numbers; bf16 on the device, float64 here."""
    state_dir = copy_state_dir(tmp_path / "state")
    keyring = KeyRing.from_file(state_dir / "keys" / "snapshot.keys")
    store = SnapshotStore(state_dir / "store")
    manifest = store.read_manifest(MODEL, keyring)
    cache = SealedCache(store.blob_path, functools.partial(agent_sealing.seal_blob, keyring), 1 << 30)
    fds = await cache.acquire("tiny", manifest, "test")
    tokens, logits = tuple(range(1, 20)), []
    backends: list[Backend] = [NumpyBackend(), CudaBackend(make_device)]
    for backend in backends:
        model = prepare_model(manifest, fds, GuestEngine())
        assert model.plan is not None
        bound = backend.bind(model.plan)  # type: ignore[arg-type]  # a plan that generates
        bound.open_kv(4)
        bound.step((SequenceInput((0, 1), 0, tokens),))
        first = bound.logits().copy()
        bound.step((SequenceInput((0, 1), len(tokens), (7,)),))
        logits.append(np.stack([first, bound.logits()]))
        bound.close()
    cache.close()
    reference, device = logits
    assert np.abs(device - reference).max() < 0.05 * np.abs(reference).max()
