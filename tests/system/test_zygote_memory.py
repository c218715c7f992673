"""What a zygote prepares and forgets leaves nothing behind in its heap."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from guests.runtime import GuestEngine
from scheduler.contract import codec
from snapshots.mapping import seal_blob
from tests.model_fixtures import SMOLLM2, BuiltState
from worker import prepared_models
from worker.prepared_models import PreparedModels
from worker.restore import prepare_restore
from worker.spawn_order import ModelPrepared, PrepareModel, SpawnedFds

MEBIBYTE = 1 << 20


def anonymous_bytes() -> int:
    """Memory of this process that is in no file."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel tells no Anonymous")


def test_forgetting_and_preparing_again_does_not_grow(
    smollm2_built: BuiltState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six rounds with the real model: after the last, what there was after the first (it grew by 8 MB a round)."""
    monkeypatch.setattr(prepared_models, "PREPARE_DELAY_S", 0.0)
    manifest = smollm2_built.manifest(SMOLLM2)
    store = smollm2_built.store
    message = PrepareModel(manifest.snapshot_id, codec.encode(manifest), "numkong", 1)
    prepare_restore()
    after: list[int] = []
    with GuestEngine() as engine, ExitStack() as stack:
        fds = SpawnedFds(*(stack.enter_context(seal_blob(store.blob_path(r), r)).fd for r in manifest.worker_blobs))
        models = PreparedModels(engine)
        for _ in range(6):
            models.begin(message, fds)
            answer = None
            while models.wait_ms() is not None:
                answer = models.step()
            assert isinstance(answer, ModelPrepared)
            models.forget(manifest.snapshot_id)
            after.append(anonymous_bytes())
    print("anonymous MiB after each round:", [round(size / MEBIBYTE, 1) for size in after])
    assert after[-1] - after[0] < 2 * MEBIBYTE
