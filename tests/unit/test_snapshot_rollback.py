"""The record of the newest manifests: an older one is refused, wherever the record is kept."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshots.errors import RolledBack, StoreError
from snapshots.manifest import Manifest, Programs
from snapshots.rollback import NewestSeen, parse_record
from tests.snapshot_fixtures import make_card


def manifest(created_at_s: float, name: str = "tiny") -> Manifest:
    """As much of a manifest as the record looks at."""
    return Manifest(name, created_at_s, {}, make_card(), {}, (), (), Programs(b"", b""))


@pytest.mark.parametrize("durable", [True, False])
def test_older_is_refused_newer_moves_the_mark(tmp_path: Path, durable: bool) -> None:
    """The same one again is fine; each name has its own mark."""
    newest = NewestSeen(tmp_path / "keys" / "newest" if durable else None)
    for created_at_s in (100.0, 100.0, 200.5, 200.5):
        newest.admit(manifest(created_at_s))
    for created_at_s in (200.4999, 100.0, -1.0):
        with pytest.raises(RolledBack, match="old manifest was put back"):
            newest.admit(manifest(created_at_s))
    newest.admit(manifest(1.0, "other"))
    newest.admit(manifest(300.0))


def test_mark_outlives_the_process(tmp_path: Path) -> None:
    """Another process, or the next start, refuses what this one saw replaced; to the last bit of the time."""
    path = tmp_path / "keys" / "newest"
    newest_s = 1_790_000_000.1234567
    NewestSeen(path).admit(manifest(newest_s))
    NewestSeen(path).admit(manifest(newest_s))
    with pytest.raises(RolledBack):
        NewestSeen(path).admit(manifest(newest_s - 2.4e-7))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["newest"]


def test_two_processes_share_one_record(tmp_path: Path) -> None:
    """What one sees the other knows, and neither forgets the other's names."""
    first, second = NewestSeen(tmp_path / "newest"), NewestSeen(tmp_path / "newest")
    first.admit(manifest(10.0, "a"))
    second.admit(manifest(20.0, "b"))
    first.admit(manifest(30.0, "a"))
    with pytest.raises(RolledBack):
        second.admit(manifest(29.0, "a"))
    with pytest.raises(RolledBack):
        first.admit(manifest(19.0, "b"))


def test_going_back_on_purpose_holds_for_everyone(tmp_path: Path) -> None:
    """The older one is the newest then, also for a process that has seen the newer."""
    agent, command = NewestSeen(tmp_path / "newest"), NewestSeen(tmp_path / "newest")
    agent.admit(manifest(20.0))
    command.go_back_to(manifest(10.0))
    agent.admit(manifest(10.0))
    with pytest.raises(RolledBack):
        agent.admit(manifest(5.0))


def test_a_clock_that_went_back_does_not_make_a_build_old() -> None:
    """A new build is always later than what was seen."""
    newest = NewestSeen(None)
    assert newest.choose_created_at_s("tiny", 50.0) == 50.0
    newest.admit(manifest(100.0))
    later = manifest(newest.choose_created_at_s("tiny", 50.0))
    assert later.created_at_s > 100.0
    newest.admit(later)
    newest.admit(msgspec.structs.replace(later, created_at_s=newest.choose_created_at_s("tiny", 1000.0)))


def test_where_nothing_can_be_written_memory_holds_the_mark(tmp_path: Path) -> None:
    """A folder that is none, as a read-only secret mount would be: still no way back while the process lives."""
    (tmp_path / "file").write_bytes(b"")
    newest = NewestSeen(tmp_path / "file" / "newest")
    newest.admit(manifest(10.0))
    with pytest.raises(RolledBack):
        newest.admit(manifest(9.0))


def test_a_record_that_is_a_symlink_is_refused(tmp_path: Path) -> None:
    """Nothing is followed."""
    (tmp_path / "real").write_text("tiny 1.0 abc\n")
    (tmp_path / "newest").symlink_to(tmp_path / "real")
    with pytest.raises(StoreError, match="symlinks"):
        NewestSeen(tmp_path / "newest").admit(manifest(1.0))


@pytest.mark.parametrize("text", ["tiny\n", "tiny x y\n", "tiny nan y\n", "../x 1.0 y\n", "tiny 1.0 y z\n", "\n"])
def test_malformed_lines_are_named(tmp_path: Path, text: str) -> None:
    """With the remedy."""
    path = tmp_path / "newest"
    path.write_text("good 1.0 abc\n" + text)
    with pytest.raises(StoreError, match=r"line 2 is not .* remove the file"):
        NewestSeen(path).admit(manifest(1.0))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_record_or_our_own_error(data: bytes) -> None:
    """No content makes the parser fail in another way."""
    try:
        parse_record(data, "record")
    except StoreError:
        pass
