"""The guests that ship with glowplug, as WebAssembly. ``python -m guests.build`` makes them from C."""

from __future__ import annotations

from pathlib import Path
from typing import Final

GUESTS_FOLDER: Final = Path(__file__).parent


def llama_wasm() -> bytes:
    """The guest of Llama-family models.

    Raises:
        FileNotFoundError: not built; run ``python -m guests.build``.
    """
    return _read("llama/llama.wasm")


def embed_wasm() -> bytes:
    """The guest of BERT-family encoders.

    Raises:
        FileNotFoundError: not built; run ``python -m guests.build``.
    """
    return _read("embed/embed.wasm")


def toy_wasm() -> bytes:
    """The example guest: no tokeniser, three operations.

    Raises:
        FileNotFoundError: not built; run ``python -m guests.build``.
    """
    return _read("examples/toy.wasm")


def bias_wasm() -> bytes:
    """The example guest that computes a tensor of its own at init.

    Raises:
        FileNotFoundError: not built; run ``python -m guests.build``.
    """
    return _read("examples/bias.wasm")


def table_wasm() -> bytes:
    """The example guest that holds a big table; what the restore benchmark restores.

    Raises:
        FileNotFoundError: not built; run ``python -m guests.build``.
    """
    return _read("examples/table.wasm")


def _read(name: str) -> bytes:
    path = GUESTS_FOLDER / name
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not built: run python -m guests.build") from error
