"""Models prepared in a zygote: the same answers as a restore, taken over only for the very same files, and unmapped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from llama_programs import compute_logits

from guests.runtime import GuestEngine
from scheduler.contract import codec
from scheduler.contract.states import Tier
from snapshots.manifest import Manifest
from snapshots.mapping import seal_blob
from tests.checkpoint_files import DATA
from tests.model_fixtures import new_state
from worker import prepared_models
from worker.backends.protocol import SequenceInput
from worker.build.hf_source import open_hugging_face
from worker.build.snapshot_builder import build_snapshot
from worker.prepared_models import PreparedModels
from worker.restore import prepare_restore, restore_model
from worker.spawn_order import ModelPrepared, PrepareFailed, PrepareModel, SpawnedFds, SpawnOrder


class Snapshot:
    """The tiny model, sealed."""

    def __init__(self, manifest: Manifest, fds: SpawnedFds, paths: list[Path]) -> None:
        self.manifest = manifest
        self.encoded = codec.encode(manifest)
        self.fds = fds
        self.paths = paths

    def message(self, backend: str = "numpy") -> PrepareModel:
        return PrepareModel(self.manifest.snapshot_id, self.encoded, backend, 1)

    def order(self, backend: str = "numpy", manifest: bytes = b"") -> SpawnOrder:
        return SpawnOrder(
            worker_id="w",
            node_id="n",
            model="tiny",
            snapshot_id=self.manifest.snapshot_id,
            redis_url="",
            manifest=manifest or self.encoded,
            backend=backend,
            num_threads=1,
            max_running=1,
            kv_budget_bytes=1 << 20,
            drain_grace_s=1.0,
            cold_tier=Tier.HOST_RAM,
        )


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Snapshot]:
    built = new_state(tmp_path_factory.mktemp("tiny") / "state")
    with open_hugging_face(DATA / "tiny_llama") as source:
        build_snapshot(source, "tiny", built.store, built.keyring)
    manifest = built.manifest("tiny")
    paths = [built.store.blob_path(ref) for ref in manifest.worker_blobs]
    with ExitStack() as stack:
        sealed = [stack.enter_context(seal_blob(p, ref)) for p, ref in zip(paths, manifest.worker_blobs, strict=True)]
        yield Snapshot(manifest, SpawnedFds(*(blob.fd for blob in sealed)), paths)


@pytest.fixture(scope="module")
def engine() -> Iterator[GuestEngine]:
    prepare_restore()
    with GuestEngine() as engine:
        yield engine


@pytest.fixture
def models(engine: GuestEngine, monkeypatch: pytest.MonkeyPatch) -> PreparedModels:
    monkeypatch.setattr(prepared_models, "PREPARE_DELAY_S", 0.0)
    return PreparedModels(engine)


def finish(models: PreparedModels) -> ModelPrepared | PrepareFailed:
    """Step until there is an answer."""
    while models.wait_ms() is not None:
        answer = models.step()
        if answer is not None:
            return answer
    raise AssertionError("ended without an answer")


def num_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:glowplug-")


@pytest.mark.parametrize("backend", ["numpy", "numkong"])
def test_a_prepared_model_answers_as_a_restored_one(
    snapshot: Snapshot, engine: GuestEngine, models: PreparedModels, backend: str
) -> None:
    """Same tokens, same logits; the step sizes that were bound ahead, and others."""
    models.begin(snapshot.message(backend), snapshot.fds)
    assert isinstance(finish(models), ModelPrepared)
    models.before_fork(snapshot.order(backend), snapshot.fds)
    inherited = models.selected
    assert inherited is not None
    plain = restore_model(snapshot.manifest, snapshot.fds.weights_fd, snapshot.fds.guest_fd, engine, seed=1)
    bound = inherited.backend.bind(plain.loaded.plan)
    resumed = inherited.model.resume(1)
    ids = resumed.loaded.text.tokenize("hello", add_special=True, parse_special=True)
    assert ids == plain.loaded.text.tokenize("hello", add_special=True, parse_special=True)
    for model in (bound, inherited.bound):
        model.open_kv(3)
    for num_tokens in (1, 5, 40):
        step = (SequenceInput((0, 1, 2), 0, tuple((ids * 40)[:num_tokens])),)
        assert np.array_equal(*[compute_logits(model, *step) for model in (bound, inherited.bound)])
    bound.close()
    del bound, model
    resumed._text.close()
    plain.close()
    models.after_fork()
    del inherited, resumed
    models.forget(snapshot.manifest.snapshot_id)


def test_forgetting_unmaps_and_closes_everything(snapshot: Snapshot, models: PreparedModels) -> None:
    """Mappings and descriptors are those of before, also when it is forgotten half-way; forgetting twice is nothing."""
    before = (num_mappings(), len(os.listdir("/proc/self/fd")))
    for num_steps in (0, 1, 2, 3, 100):
        models.begin(snapshot.message("numkong"), snapshot.fds)
        for _ in range(num_steps):
            if models.wait_ms() is not None:
                models.step()
        models.forget(snapshot.manifest.snapshot_id)
        models.forget(snapshot.manifest.snapshot_id)
        assert (num_mappings(), len(os.listdir("/proc/self/fd"))) == before
        assert models.wait_ms() is None


def test_a_weight_that_is_still_in_use_costs_memory_and_not_the_zygote(
    snapshot: Snapshot, models: PreparedModels
) -> None:
    """A zygote that died of it would take every worker of the host along; its other models are as they were."""
    models.begin(snapshot.message(), snapshot.fds)
    assert isinstance(finish(models), ModelPrepared)
    models.before_fork(snapshot.order(), snapshot.fds)
    assert models.selected is not None
    held = models.selected.model.weights.view()
    models.after_fork()
    models.forget(snapshot.manifest.snapshot_id)
    assert len(bytes(held[:8])) == 8  # still mapped
    models.begin(snapshot.message(), snapshot.fds)
    assert isinstance(finish(models), ModelPrepared)
    models.forget(snapshot.manifest.snapshot_id)


def test_only_the_very_same_files_and_settings_are_taken_over(snapshot: Snapshot, models: PreparedModels) -> None:
    """Another manifest, another backend, or the same bytes in another memory file: the worker restores by itself."""
    models.begin(snapshot.message(), snapshot.fds)
    models.before_fork(snapshot.order(), snapshot.fds)
    assert models.selected is None  # nothing is prepared yet
    finish(models)
    with seal_blob(snapshot.paths[0], snapshot.manifest.weights) as again:
        others = [
            (snapshot.order(manifest=snapshot.encoded + b"x"), snapshot.fds),
            (snapshot.order("numkong"), snapshot.fds),
            (snapshot.order(), SpawnedFds(again.fd, *snapshot.fds.all[1:])),
        ]
        for order, fds in others:
            models.before_fork(order, fds)
            assert models.selected is None
            models.after_fork()
    models.before_fork(snapshot.order(), snapshot.fds)
    assert models.selected is not None
    models.after_fork()
    assert models.selected is None
    models.forget(snapshot.manifest.snapshot_id)


def test_a_child_has_the_weights_of_its_own_model_only(snapshot: Snapshot, models: PreparedModels) -> None:
    """What a worker was not forked for is not in its address space, so it neither reads it nor keeps it alive."""
    models.begin(snapshot.message(), snapshot.fds)
    finish(models)
    name = f"glowplug-{snapshot.manifest.weights.digest[:16]}"

    def child_has_weights() -> bool:
        pid = os.fork()
        if pid == 0:
            os._exit(1 if name in Path("/proc/self/maps").read_text() else 0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1

    assert not child_has_weights()
    models.before_fork(snapshot.order(), snapshot.fds)
    assert child_has_weights()
    models.after_fork()
    assert not child_has_weights()
    models.forget(snapshot.manifest.snapshot_id)


def test_a_preparation_that_fails_says_why_and_leaves_nothing(snapshot: Snapshot, models: PreparedModels) -> None:
    """Exchanged files, an unknown backend: an answer with the cause; no mapping, no descriptor, no step left."""
    before = (num_mappings(), len(os.listdir("/proc/self/fd")))
    exchanged = SpawnedFds(snapshot.fds.guest_fd, snapshot.fds.weights_fd)
    for message, fds, cause in (
        (snapshot.message(), exchanged, "expected"),
        (snapshot.message("abacus"), snapshot.fds, "abacus"),
    ):
        models.begin(message, fds)
        answer = finish(models)
        assert isinstance(answer, PrepareFailed)
        assert cause in answer.reason
        assert (num_mappings(), len(os.listdir("/proc/self/fd"))) == before
