"""``inspect``, ``export``, ``import``, ``gc``, ``resign`` and key rotation as a user runs them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from guests.compile import guest_identity
from scheduler.command import main
from scheduler.contract import environment
from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from tests.snapshot_fixtures import SyntheticSnapshot, build_snapshot, flip_byte


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches these tests."""
    for name in (environment.SNAPSHOT_KEYS, environment.SNAPSHOT_KEY, "GLOWPLUG_DEV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(environment.STATE_DIR, str(tmp_path / "default-state"))


@pytest.fixture
def state(tmp_path: Path) -> tuple[Path, SyntheticSnapshot]:
    """A state folder with a key and one snapshot."""
    folder = tmp_path / "state"
    keyring = KeyRing.generate_file(folder / "keys" / "snapshot.keys", key_id="first")
    return folder, build_snapshot(folder / "store", keyring=keyring, identity=guest_identity())


def glowplug(folder: Path, *arguments: object) -> Result:
    """Run a command on the state folder; no secret of its key file is ever shown."""
    result = CliRunner().invoke(main, [*(str(argument) for argument in arguments), "--state-dir", str(folder)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    key_file = folder / "keys" / "snapshot.keys"
    for word in key_file.read_text().split() if key_file.exists() else ():
        assert len(word) < 64 or word not in result.output
    return result


def test_inspect_shows_everything(state: tuple[Path, SyntheticSnapshot]) -> None:
    """Sections with sizes, signer, id, identity, and each tensor; JSON holds the same."""
    folder, snapshot = state
    result = glowplug(folder, "inspect", "tiny")
    assert result.exit_code == 0
    for text in (snapshot.manifest.snapshot_id, "first", "guest_cwasm", "100,000", "layers.0.qkv.weight", "288 x 96"):
        assert text in result.stdout
    data = json.loads(glowplug(folder, "inspect", "tiny", "--json").stdout)
    assert data["signer_key_id"] == "first"
    assert [section["section"] for section in data["sections"]][:2] == ["manifest", "guest_cwasm"]
    assert data["tensors"][0] == {
        "name": "embed.weight",
        "dtype": "BF16",
        "shape": [512, 96],
        "offset": 4096,
        "size_bytes": 98304,
        "handle": 1,
    }
    assert data["identity"] == guest_identity()


def test_inspect_refuses_what_does_not_verify(state: tuple[Path, SyntheticSnapshot]) -> None:
    """Nothing of an unauthentic manifest is shown."""
    folder, snapshot = state
    flip_byte(snapshot.manifest_path, 200)
    result = glowplug(folder, "inspect", "tiny")
    assert result.exit_code == 2
    assert "does not match" in result.stderr
    assert result.stdout == ""


def test_export_and_import_between_states(state: tuple[Path, SyntheticSnapshot], tmp_path: Path) -> None:
    """A second machine with the same key takes the file, whole; again under another name; not without the key."""
    folder, _ = state
    file, there = tmp_path / "tiny.gpx", tmp_path / "there"
    result = glowplug(folder, "export", "tiny", file, "--level", "9")
    assert (result.exit_code, result.stdout.split()[:2]) == (0, ["exported", "tiny"])
    assert glowplug(there, "import", file).exit_code == 2
    (there / "keys").mkdir(parents=True)
    (there / "keys" / "snapshot.keys").write_bytes((folder / "keys" / "snapshot.keys").read_bytes())
    (there / "keys" / "snapshot.keys").chmod(0o600)
    result = glowplug(there, "import", file)
    assert (result.exit_code, result.stdout.split()[:2]) == (0, ["imported", "tiny"])
    assert result.stderr == ""
    assert glowplug(there, "import", file, "--name", "again").exit_code == 0
    assert glowplug(there, "verify").stdout == "again: ok\ntiny: ok\n"
    assert glowplug(folder, "export", "tiny", file).exit_code == 2


def test_import_for_another_machine_says_so(tmp_path: Path) -> None:
    """It is kept (this host may only store it), and the note says why it cannot serve."""
    folder = tmp_path / "state"
    keyring = KeyRing.generate_file(folder / "keys" / "snapshot.keys")
    build_snapshot(folder / "store", keyring=keyring)
    assert glowplug(folder, "export", "tiny", tmp_path / "file").exit_code == 0
    result = glowplug(folder, "import", tmp_path / "file", "--name", "copy")
    assert result.exit_code == 0
    assert "cannot serve on this machine" in result.stderr


def test_gc_deletes_only_what_nobody_names(state: tuple[Path, SyntheticSnapshot]) -> None:
    """Young blobs stay for the default grace; with none they go; the snapshot stays whole."""
    folder, _ = state
    orphan = SnapshotStore(folder / "store").add_blob_bytes(b"orphan")
    assert glowplug(folder, "gc").stdout == "deleted 0 blobs, 0 bytes\n"
    os.utime(SnapshotStore(folder / "store").blob_path(orphan), (1, 1))
    assert glowplug(folder, "gc").stdout == "deleted 1 blob, 6 bytes\n"
    assert glowplug(folder, "verify").exit_code == 0


def test_rotate_resign_revoke(state: tuple[Path, SyntheticSnapshot]) -> None:
    """The whole life of a key: replaced, snapshots signed anew with the same id, then refused by name."""
    folder, snapshot = state
    build_snapshot(folder / "store", "left", keyring=snapshot.keyring, identity=guest_identity())
    assert glowplug(folder, "keys", "rotate", "--key-id", "second").exit_code == 0
    assert glowplug(folder, "keys", "list").stdout == "first  verifies\nsecond  signs\n"
    result = glowplug(folder, "resign", "tiny")
    assert result.stdout == "tiny: signed with second, before with first\n"
    assert glowplug(folder, "resign", "tiny").stdout == "tiny: signed with second already\n"
    assert "second signs" in glowplug(folder, "keys", "revoke", "first").stdout
    assert glowplug(folder, "keys", "list").stdout == "first  revoked\nsecond  signs\n"
    result = glowplug(folder, "verify")
    assert result.exit_code == 1
    assert "left: 1 problem\n  manifest: signed with key 'first', which is revoked" in result.stdout
    assert "tiny: ok\n" in result.stdout
    result = glowplug(folder, "resign", "--all")
    assert result.exit_code == 1
    assert "left: not signed: signed with key 'first', which is revoked" in result.stderr
    assert json.loads(glowplug(folder, "inspect", "tiny", "--json").stdout)["snapshot_id"] == (
        snapshot.manifest.snapshot_id
    )


@pytest.mark.parametrize("arguments", [("resign",), ("resign", "tiny", "--all")])
def test_resign_wants_names_or_all(state: tuple[Path, SyntheticSnapshot], arguments: tuple[str, ...]) -> None:
    """Neither nor both is a mistake."""
    assert glowplug(state[0], *arguments).exit_code == 2


def test_encryption_key_is_made_beside_the_signing_key(state: tuple[Path, SyntheticSnapshot]) -> None:
    """It neither signs nor can it be revoked; the next one takes over and the first still decrypts."""
    folder, _ = state
    for key_id in ("e-one", "e-two"):
        result = glowplug(folder, "keys", "rotate", "--encryption", "--key-id", key_id)
        assert f"key {key_id} encrypts from now on" in result.stdout
    assert glowplug(folder, "keys", "list").stdout == "first  signs\ne-one  decrypts\ne-two  encrypts\n"
    result = glowplug(folder, "keys", "revoke", "e-one")
    assert result.exit_code == 2
    assert "could never be read again" in result.stderr


def test_old_manifest_put_back_is_found(state: tuple[Path, SyntheticSnapshot]) -> None:
    """After a newer build was seen, the older file of the same name is a problem that verify names."""
    folder, snapshot = state
    assert glowplug(folder, "verify").exit_code == 0
    old = snapshot.manifest_path.read_bytes()
    build_snapshot(folder / "store", keyring=snapshot.keyring, created_at_s=1_800_000_000.0, identity=guest_identity())
    assert glowplug(folder, "verify").exit_code == 0
    snapshot.manifest_path.write_bytes(old)
    result = glowplug(folder, "verify")
    assert result.exit_code == 1
    assert "an old manifest was put back" in result.stdout
