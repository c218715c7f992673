"""Checks of a set-up look and change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshots.keyring import KeyRing
from worker.diagnosis.setup_checks import check_store


def test_a_folder_without_a_store_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that was mistyped, or where nothing was built yet, is told; no store is made in it."""
    for name in ("GLOWPLUG_SNAPSHOT_KEYS", "GLOWPLUG_SNAPSHOT_KEY"):
        monkeypatch.delenv(name, raising=False)
    KeyRing.generate_file(tmp_path / "keys" / "snapshot.keys")
    (finding,) = check_store(tmp_path)
    assert (finding.level, finding.seen) == ("warn", "none")
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]
