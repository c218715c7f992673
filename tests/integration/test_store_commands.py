"""``glowplug verify`` and ``glowplug keys`` as a user runs them."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from guests.compile import guest_identity
from scheduler.command import main
from scheduler.contract import environment
from snapshots.keyring import KeyRing
from tests.snapshot_fixtures import SyntheticSnapshot, build_snapshot, flip_byte, make_key

SECRET = make_key().secret.hex()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches these tests."""
    for name in (environment.SNAPSHOT_KEYS, environment.SNAPSHOT_KEY, "GLOWPLUG_DEV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(environment.STATE_DIR, str(tmp_path / "default-state"))


@pytest.fixture
def state(tmp_path: Path) -> tuple[Path, SyntheticSnapshot]:
    """A state folder with one snapshot and its key."""
    snapshot = build_snapshot(tmp_path / "state" / "store", identity=guest_identity())
    key_file = tmp_path / "state" / "keys" / "snapshot.keys"
    key_file.parent.mkdir()
    key_file.write_text(f"test-1 {SECRET} 2026-01-01T00:00:00Z active\n")
    key_file.chmod(0o600)
    return tmp_path / "state", snapshot


def glowplug(*arguments: object) -> Result:
    """Run the command line."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert SECRET not in result.output
    return result


def test_good_snapshot_is_ok(state: tuple[Path, SyntheticSnapshot]) -> None:
    """Exit code 0, with and without a name."""
    folder, _ = state
    for names in (["tiny"], []):
        result = glowplug("verify", *names, "--state-dir", folder)
        assert (result.exit_code, result.stdout) == (0, "tiny: ok\n")


def test_state_dir_from_the_environment(state: tuple[Path, SyntheticSnapshot], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --state-dir the environment's folder is used."""
    monkeypatch.setenv(environment.STATE_DIR, str(state[0]))
    assert glowplug("verify").exit_code == 0


def test_problems_are_listed_with_their_place(state: tuple[Path, SyntheticSnapshot]) -> None:
    """Exit code 1; one line for each bad chunk; JSON says the same; other snapshots are still checked."""
    folder, snapshot = state
    build_snapshot(folder / "store", "other", seed=30, identity=guest_identity())
    flip_byte(snapshot.path_of("weights"), 70_000)
    flip_byte(snapshot.path_of("guest_cwasm"), 5)
    result = glowplug("verify", "--state-dir", folder)
    assert result.exit_code == 1
    assert "other: ok\ntiny: 2 problems\n" in result.stdout
    assert "  guest_cwasm, chunk 0 at byte 0: " in result.stdout
    assert "  weights, chunk 1 at byte 65536: " in result.stdout
    result = glowplug("verify", "--json", "--state-dir", folder)
    assert result.exit_code == 1
    other, tiny = json.loads(result.stdout)["snapshots"]
    assert (other["name"], other["ok"], other["problems"]) == ("other", True, [])
    assert set(other["fs_verity"]) == {"weights", "guest_cwasm", "guest_wasm"}
    assert {finding["state"] for finding in other["fs_verity"].values()} <= {"not offered here", "off"}
    assert (tiny["ok"], len(tiny["problems"])) == (False, 2)


def test_bad_signature_is_a_problem(state: tuple[Path, SyntheticSnapshot]) -> None:
    """A changed manifest is found like any other damage."""
    folder, snapshot = state
    flip_byte(snapshot.manifest_path, 100)
    result = glowplug("verify", "tiny", "--state-dir", folder)
    assert result.exit_code == 1
    assert "manifest: signature by key 'test-1' does not match" in result.stdout


def test_snapshot_for_another_machine_is_a_problem(state: tuple[Path, SyntheticSnapshot]) -> None:
    """Whole, but its compiled guest cannot run here: said, unless that is not asked."""
    folder, _ = state
    build_snapshot(folder / "store", "foreign")
    result = glowplug("verify", "foreign", "--state-dir", folder)
    assert result.exit_code == 1
    assert "  identity: " in result.stdout
    assert "wasmtime: built with 50.0.0" in result.stdout
    result = glowplug("verify", "foreign", "--any-machine", "--state-dir", folder)
    assert (result.exit_code, result.stdout) == (0, "foreign: ok\n")


def test_what_cannot_be_checked_exits_with_2(state: tuple[Path, SyntheticSnapshot], tmp_path: Path) -> None:
    """Unknown name, bad name, no store, no key, unknown option: a line that says what to do, and nothing is made."""
    folder, _ = state
    cases = [
        (("verify", "none", "--state-dir", folder), "glowplug build SOURCE --name none"),
        (("verify", "../tiny", "--state-dir", folder), "snapshot name"),
        (("verify", "tiny", "--state-dir", folder, "--key-file", tmp_path / "none"), "glowplug keys new"),
        (("verify", "tiny", "--state-dir", tmp_path / "nowhere"), "glowplug keys new"),
        (("verify", "--nonsense"), "No such option"),
    ]
    for arguments, remedy in cases:
        result = glowplug(*arguments)
        assert result.exit_code == 2
        assert remedy in result.stderr
    assert not (tmp_path / "nowhere").exists()


def test_missing_store_is_not_made(tmp_path: Path) -> None:
    """A mistyped folder is an error, not a new, empty store - also in development mode."""
    KeyRing.generate_file(tmp_path / "keys" / "snapshot.keys")
    result = glowplug("verify", "--state-dir", tmp_path)
    assert result.exit_code == 2
    assert "no snapshots below" in result.stderr
    assert not (tmp_path / "store").exists()


def test_verify_makes_no_key_in_development_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh key could verify nothing, so none is made."""
    monkeypatch.setenv("GLOWPLUG_DEV", "1")
    build_snapshot(tmp_path / "store")
    assert glowplug("verify", "--state-dir", tmp_path).exit_code == 2
    assert not (tmp_path / "keys").exists()


def test_new_key_is_private_and_never_overwrites(tmp_path: Path) -> None:
    """Made with mode 0600; a second time is refused and says how to rotate."""
    path = tmp_path / "keys" / "snapshot.keys"
    result = glowplug("keys", "new", "--state-dir", tmp_path, "--key-id", "main")
    assert result.exit_code == 0
    assert "key main signs from now on" in result.stdout
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    assert before.split()[-3].decode() not in result.output
    result = glowplug("keys", "new", "--state-dir", tmp_path)
    assert result.exit_code == 2
    assert "glowplug keys rotate" in result.stderr
    assert path.read_bytes() == before


def test_rotation_keeps_old_snapshots_valid(state: tuple[Path, SyntheticSnapshot]) -> None:
    """After a rotation the old signature verifies, and the list shows which key signs."""
    folder, _ = state
    assert glowplug("keys", "rotate", "--state-dir", folder, "--key-id", "next").exit_code == 0
    assert glowplug("keys", "list", "--state-dir", folder).stdout == "test-1  verifies\nnext  signs\n"
    assert glowplug("verify", "tiny", "--state-dir", folder).exit_code == 0


def test_key_file_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that serve reads names the file that ``keys`` makes, unless a folder is given."""
    monkeypatch.setenv(environment.SNAPSHOT_KEYS, str(tmp_path / "here.keys"))
    assert glowplug("keys", "new").exit_code == 0
    assert (tmp_path / "here.keys").exists()
    assert glowplug("keys", "new", "--state-dir", tmp_path / "there").exit_code == 0
    assert (tmp_path / "there" / "keys" / "snapshot.keys").exists()


@pytest.mark.parametrize("arguments", [("new", "--key-id", "a/b"), ("rotate",), ("revoke", "main"), ("list",)])
def test_key_mistakes_exit_with_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """A bad id, rotating or listing a file that does not exist: nothing is written."""
    result = glowplug("keys", *arguments, "--state-dir", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert not (tmp_path / "keys" / "snapshot.keys").exists()
