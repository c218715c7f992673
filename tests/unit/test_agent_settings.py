"""The agent's settings and keys: what is accepted, and what a refusal says."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from scheduler.contract.environment import SettingsError
from snapshots.errors import KeyRingError
from snapshots.keyring import KeyRing
from worker.agent_settings import load_keyring, read_agent_settings


def test_defaults_follow_the_machine() -> None:
    """Without variables: the CPU backend, one thread a core, most of the memory."""
    settings = read_agent_settings(1000, {"GLOWPLUG_STATE_DIR": "/state"})
    assert settings.backend == "numkong"
    assert settings.num_threads >= 1
    assert settings.sealed_limit_bytes == 800
    assert settings.store_root == Path("/state/store")


def test_unknown_backend_is_refused_by_name() -> None:
    """A backend that does not exist is named together with those that do."""
    with pytest.raises(SettingsError, match='GLOWPLUG_BACKEND="abacus": expected one of numkong, numpy'):
        read_agent_settings(1000, {"GLOWPLUG_BACKEND": "abacus"})


def test_missing_key_refuses_to_start_and_says_how_to_make_one(tmp_path: Path) -> None:
    """Outside of development there is no start without a key."""
    with pytest.raises(SettingsError, match="glowplug keys new"):
        load_keyring(tmp_path, {})
    assert not (tmp_path / "keys").exists()


def test_development_makes_a_private_key_and_keeps_it(tmp_path: Path) -> None:
    """GLOWPLUG_DEV=1 makes a key of mode 0600 once; the next start reads the same."""
    made = load_keyring(tmp_path, {"GLOWPLUG_DEV": "1"})
    path = tmp_path / "keys" / "snapshot.keys"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_keyring(tmp_path, {}).key_ids == made.key_ids


def test_key_from_file_or_environment_but_not_both(tmp_path: Path) -> None:
    """Either source works; two at once are refused instead of one silently winning."""
    path = tmp_path / "my.keys"
    made = KeyRing.generate_file(path)
    assert load_keyring(tmp_path, {"GLOWPLUG_SNAPSHOT_KEYS": str(path)}).key_ids == made.key_ids
    text = "main:" + "5f" * 32
    assert load_keyring(tmp_path, {"GLOWPLUG_SNAPSHOT_KEY": text}).key_ids == ("main",)
    with pytest.raises(SettingsError, match="both set"):
        load_keyring(tmp_path, {"GLOWPLUG_SNAPSHOT_KEYS": str(path), "GLOWPLUG_SNAPSHOT_KEY": text})


def test_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """A leaked key is no key: the refusal names the file and the remedy."""
    path = tmp_path / "my.keys"
    KeyRing.generate_file(path)
    path.chmod(0o644)
    with pytest.raises(KeyRingError, match="chmod 600"):
        load_keyring(tmp_path, {"GLOWPLUG_SNAPSHOT_KEYS": str(path)})


def test_verification_policy_is_once_unless_said(tmp_path: Path) -> None:
    """Any other word is refused together with those that exist."""
    assert read_agent_settings(1000, {}).verification == "once"
    assert read_agent_settings(1000, {"GLOWPLUG_VERIFY": "always"}).verification == "always"
    with pytest.raises(SettingsError, match='GLOWPLUG_VERIFY="never": expected one of once, always'):
        read_agent_settings(1000, {"GLOWPLUG_VERIFY": "never"})


def test_drafts_are_off_unless_asked_for() -> None:
    """Tokens are guessed ahead where the operator says how many; nonsense is refused by name."""
    assert read_agent_settings(1000, {}).draft_tokens == 0
    assert read_agent_settings(1000, {"GLOWPLUG_DRAFT_TOKENS": "8"}).draft_tokens == 8
    for wrong in ("-1", "33", "many", "1.5"):
        with pytest.raises(SettingsError, match=r"GLOWPLUG_DRAFT_TOKENS=.*from 0"):
            read_agent_settings(1000, {"GLOWPLUG_DRAFT_TOKENS": wrong})
