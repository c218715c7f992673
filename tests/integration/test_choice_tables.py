"""The benchmarks behind chunk size, zstd level and madvise run, and report every choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worker.benchmarks import chunk_table, madvise_table


def test_chunk_table_has_every_size_and_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small compressible blob: each size and level has a row, and it shrinks."""
    blob, target = tmp_path / "blob", tmp_path / "figures.json"
    blob.write_bytes(b"0123456789abcdef" * (1 << 17))
    assert chunk_table.main(["--blob", str(blob), "--samples", "1", "--stride", "1", "--json", str(target)]) == 0
    figures = json.loads(target.read_text())
    assert [row["chunk_bytes"] for row in figures["chunk_sizes"]] == list(chunk_table.CHUNK_BYTES)
    assert [row["level"] for row in figures["levels"]] == list(chunk_table.LEVELS)
    assert all(row["zstd_share"] < 0.1 for rows in (figures["chunk_sizes"], figures["levels"]) for row in rows)
    assert "| 1024 KiB |" in capsys.readouterr().out


def test_madvise_table_has_every_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sealed memory with both page sizes, and the file itself with nothing of it in the page cache."""
    target = tmp_path / "figures.json"
    assert madvise_table.main(["--mib", "2", "--samples", "2", "--cold", "1", "--json", str(target)]) == 0
    rows = json.loads(target.read_text())
    assert {row["pages"] for row in rows} == {"2 MiB", "4 KiB", "file, cold"}
    for pages in ("2 MiB", "4 KiB", "file, cold"):
        assert [row["advice"] for row in rows if row["pages"] == pages] == list(madvise_table.ADVICES)
    assert "| file, cold | SEQUENTIAL |" in capsys.readouterr().out
