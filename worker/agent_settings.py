"""Settings of a node agent beyond those that every process has, and where its verification keys come from."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import structlog

from scheduler.contract import environment
from scheduler.contract.environment import ProcessSettings, SettingsError, read_positive_float
from snapshots.keyring import KeyRing
from snapshots.rollback import RECORD_NAME
from worker.backends.cores import count_usable_cores
from worker.backends.detection import CPU_BACKENDS, CUDA, detect_backend

BACKEND: Final = "GLOWPLUG_BACKEND"
THREADS: Final = "GLOWPLUG_THREADS"
SEALED_LIMIT_BYTES: Final = "GLOWPLUG_SEALED_LIMIT_BYTES"
FILL_LIMIT_BYTES_PER_S: Final = "GLOWPLUG_FILL_LIMIT_BYTES_PER_S"
DRAIN_GRACE_S: Final = "GLOWPLUG_DRAIN_GRACE_S"
VERIFY: Final = "GLOWPLUG_VERIFY"
DRAFT_TOKENS: Final = "GLOWPLUG_DRAFT_TOKENS"
DEV: Final = "GLOWPLUG_DEV"
SPARE_WORKERS: Final = "GLOWPLUG_SPARE_WORKERS"
STOPPED_LIMIT_S: Final = "GLOWPLUG_STOPPED_LIMIT_S"

#: ``auto``: cuda where there is a GPU and CuPy, else numkong.
BACKENDS: Final = (*CPU_BACKENDS, CUDA, "auto")
#: ``once``: bytes are verified as they enter sealed memory, where they cannot change. ``always``: before each wake too.
VERIFICATION_POLICIES: Final = ("once", "always")
DEFAULT_DRAIN_GRACE_S: Final = 10.0
DEFAULT_STOPPED_LIMIT_S: Final = 1.5
MAX_DRAFT_TOKENS: Final = 32
MAX_SPARE_WORKERS: Final = 8
SEALED_MEMORY_FRACTION: Final = 0.8


class AgentSettings(msgspec.Struct, frozen=True):
    """What a node agent needs to know. ``drain_grace_s`` is what running requests get when the agent stops;
    ``fill_limit_bytes_per_s`` is how fast weights are read into sealed memory, ahead of their use (0: unlimited)."""

    process: ProcessSettings
    backend: str
    num_threads: int
    sealed_limit_bytes: int
    drain_grace_s: float
    verification: str = VERIFICATION_POLICIES[0]
    draft_tokens: int = 0  # guessed ahead in each sequence; 0: none
    fill_limit_bytes_per_s: float = 0
    spare_workers: int = 0  # kept warm on each GPU
    stopped_limit_s: float = DEFAULT_STOPPED_LIMIT_S  # a worker that a signal stopped for so long is ended

    @property
    def store_root(self) -> Path:
        return self.process.state_dir / "store"

    @property
    def newest_record(self) -> Path:
        """Where the newest manifests that were seen are kept, so that none older is served."""
        return newest_record(self.process.state_dir)


def read_agent_settings(memory_total_bytes: int, env: Mapping[str, str] = os.environ) -> AgentSettings:
    """Settings from the environment.

    Raises:
        SettingsError: a value is malformed.
    """
    backend = env.get(BACKEND) or "auto"
    if backend not in BACKENDS:
        raise SettingsError(f'{BACKEND}="{backend}": expected one of {", ".join(BACKENDS)}')
    if backend == "auto":
        backend = detect_backend()
    verification = env.get(VERIFY) or VERIFICATION_POLICIES[0]
    if verification not in VERIFICATION_POLICIES:
        raise SettingsError(f'{VERIFY}="{verification}": expected one of {", ".join(VERIFICATION_POLICIES)}')
    num_cores = count_usable_cores()
    return AgentSettings(
        process=environment.read_process_settings(env),
        backend=backend,
        num_threads=int(read_positive_float(THREADS, num_cores, env)),
        sealed_limit_bytes=int(
            read_positive_float(SEALED_LIMIT_BYTES, memory_total_bytes * SEALED_MEMORY_FRACTION, env)
        ),
        drain_grace_s=read_positive_float(DRAIN_GRACE_S, DEFAULT_DRAIN_GRACE_S, env),
        verification=verification,
        draft_tokens=_read_count(DRAFT_TOKENS, MAX_DRAFT_TOKENS, env),
        spare_workers=_read_spare_workers(backend, env),
        fill_limit_bytes_per_s=read_positive_float(FILL_LIMIT_BYTES_PER_S, math.inf, env),
        stopped_limit_s=read_positive_float(STOPPED_LIMIT_S, DEFAULT_STOPPED_LIMIT_S, env),
    )


def _read_count(name: str, maximum: int, env: Mapping[str, str]) -> int:
    text = env.get(name) or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 4 and int(text) <= maximum):
        raise SettingsError(f'{name}="{text}": expected a whole number from 0 (off) to {maximum}')
    return int(text)


def _read_spare_workers(backend: str, env: Mapping[str, str]) -> int:
    number = _read_count(SPARE_WORKERS, MAX_SPARE_WORKERS, env)
    if number and backend in CPU_BACKENDS:
        raise SettingsError(
            f'{SPARE_WORKERS}="{number}": spares are for GPUs, and this node\'s backend is {backend}, whose workers '
            "are forked in milliseconds with their model prepared: set it to 0"
        )
    return number


def newest_record(state_dir: Path) -> Path:
    """The rollback record of a state folder: beside its keys, not in its store (see snapshots.rollback)."""
    return state_dir / "keys" / RECORD_NAME


def load_keyring(state_dir: Path, env: Mapping[str, str] = os.environ) -> KeyRing:
    """Keys that snapshots are verified with: a key file, a key in the environment, or the state folder's own file.

    In development (GLOWPLUG_DEV=1) a missing key is made, readable by this user only, and that is logged.

    Raises:
        KeyRingError: a key source is malformed or not private.
        SettingsError: there is no key, or two sources contradict each other.
    """
    file, text = env.get(environment.SNAPSHOT_KEYS), env.get(environment.SNAPSHOT_KEY)
    if file and text:
        raise SettingsError(f"{environment.SNAPSHOT_KEYS} and {environment.SNAPSHOT_KEY} are both set: keep one")
    if file:
        return KeyRing.from_file(Path(file))
    if text:
        return KeyRing.from_text(text)
    default = state_dir / "keys" / "snapshot.keys"
    if default.exists():
        return KeyRing.from_file(default)
    if env.get(DEV) != "1":
        raise SettingsError(
            f"no key to verify snapshots with: make one with `glowplug keys new` (it writes {default}), or set "
            f"{environment.SNAPSHOT_KEYS}=FILE or {environment.SNAPSHOT_KEY}=ID:HEX"
        )
    keyring = KeyRing.generate_file(default)
    structlog.get_logger().warning("development_key_made", path=str(default), mode="0600", key_id=keyring.key_ids[0])
    return keyring
