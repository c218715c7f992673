"""fs-verity with the real kernel: on the first filesystem that offers it, else the plain answer that none does.

Folders that are tried: ``GLOWPLUG_TEST_VERITY_DIR``, which a developer can point at a filesystem made with
``mkfs.ext4 -O verity``, and the test's own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshots.fs_verity import enable_verity, examine_verity
from tests.snapshot_fixtures import build_snapshot, flip_byte


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the test's store lies."""
    parent = os.environ.get("GLOWPLUG_TEST_VERITY_DIR")
    if not parent:
        yield tmp_path
        return
    made = Path(tempfile.mkdtemp(dir=parent))
    yield made
    shutil.rmtree(made)


def test_kernel_and_software_agree_or_the_kernel_has_none(folder: Path) -> None:
    """Offered: every blob's measure is the signed digest, and no file can be opened for writing any more.

    Not offered: that is what each blob's finding says; building and verifying work all the same.
    """
    probe = folder / "probe"
    probe.write_bytes(b"probe")
    is_offered = enable_verity(probe)
    snapshot = build_snapshot(folder / "store", with_verity=True)
    findings = {role: examine_verity(snapshot.path_of(role), ref) for role, ref in snapshot.manifest.blobs.items()}
    assert snapshot.store.verify("tiny", snapshot.keyring) == []
    print(f"fs-verity: {sorted({(finding.state, finding.detail) for finding in findings.values()})}")
    if not is_offered:
        assert all(finding.state in ("not offered here", "off") for finding in findings.values())
        return
    assert all(finding.state == "matches" for finding in findings.values())
    with pytest.raises(PermissionError):
        flip_byte(snapshot.path_of("weights"), 0)
