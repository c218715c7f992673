"""Watching the store: a real folder and the kernel's inotify."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.snapshot_fixtures import SyntheticSnapshot, build_snapshot
from worker import store_watch
from worker.store_watch import StoreWatch

LONG_S = 30.0  # only a test that fails waits as long


@pytest.fixture
def snapshot(tmp_path: Path) -> SyntheticSnapshot:
    return build_snapshot(tmp_path / "store", "tiny")


async def test_a_published_a_replaced_and_a_removed_manifest_are_seen(snapshot: SyntheticSnapshot) -> None:
    """Each of them ends a wait; in between nothing does."""
    with StoreWatch(snapshot.store.manifests_folder) as watch:
        assert not await watch.wait_changed(0.01)
        snapshot.store.write_manifest(snapshot.manifest, snapshot.keyring)
        assert await watch.wait_changed(LONG_S)
        assert not await watch.wait_changed(0.01)
        snapshot.store.remove("tiny")
        assert await watch.wait_changed(LONG_S)


async def test_a_change_before_the_wait_is_not_missed(snapshot: SyntheticSnapshot) -> None:
    """What changes while the agent still looks at the last change is seen by the next wait, many changes by one."""
    with StoreWatch(snapshot.store.manifests_folder) as watch:
        for _ in range(20):
            snapshot.store.write_manifest(snapshot.manifest, snapshot.keyring)
        assert await watch.wait_changed(LONG_S)
        await asyncio.sleep(0)
        assert not await watch.wait_changed(0.01)


async def test_without_inotify_a_wait_ends_by_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that refuses is named in a warning with a remedy; the agent looks once a second as before."""

    def refuse(folder: Path) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(store_watch, "_open_inotify", refuse)
    with capture_logs() as logs, StoreWatch(tmp_path) as watch:
        (tmp_path / "new.gpsnap").touch()
        assert not await watch.wait_changed(0.01)
    assert [entry["event"] for entry in logs] == ["store_not_watched"]
    assert "max_user_instances" in logs[0]["remedy"]


async def test_a_folder_that_is_not_there_is_an_error_of_the_kernel(tmp_path: Path) -> None:
    """No descriptor is left open by a watch that failed."""
    with pytest.raises(FileNotFoundError):
        store_watch._open_inotify(tmp_path / "missing")
