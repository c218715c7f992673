"""``python -m guests FILE.wasm``: what a guest imports and exports, or why it is refused."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from guests.errors import GuestModuleRefused
from guests.module import WasmModule, parse_guest
from guests.wasm_format import WASM_PAGE_BYTES, ExternKind


def describe(module: WasmModule) -> list[str]:
    """Lines about an accepted guest."""
    assert module.memory is not None  # parse_guest made sure
    lines = [
        f"memory     {module.memory.minimum * WASM_PAGE_BYTES >> 10} KiB at start",
        f"state      {sum(g.mutable for g in module.globals)} mutable globals, {len(module.tables)} tables",
        f"tokeniser  {'yes' if module.has_tokenizer else 'no'}",
    ]
    lines += [f"import     {function.name}{function.type}" for function in module.imports]
    lines += [
        f"export     {export.name}{module.functions[export.index]}"
        for export in module.exports
        if export.kind is ExternKind.FUNCTION
    ]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m guests", description="Check a guest against the ABI.")
    parser.add_argument("file", type=Path, help="WebAssembly module")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(describe(parse_guest(options.file.read_bytes()))))
    except (OSError, GuestModuleRefused) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
