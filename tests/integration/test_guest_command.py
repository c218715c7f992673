"""``glowplug guests``: compile, inspect, run, through the real entry point."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from guest_fixtures import bytes_guest, compiled

from guests.shipped import GUESTS_FOLDER
from scheduler.command import main
from tests.python_guest_fixtures import compiled_python_component, python_component

TOY = GUESTS_FOLDER / "examples" / "toy.wasm"
TABLE = GUESTS_FOLDER / "examples" / "table.wasm"


def call(*arguments: object, code: int = 0) -> str:
    """Run the command; what it printed (where it succeeds: to standard output)."""
    result = CliRunner().invoke(main, ["guests", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def call_json(*arguments: object) -> Any:
    """Run it with ``--json``."""
    return json.loads(call(*arguments, "--json"))


def test_compile_then_run_a_table_out_of_the_frozen_memory(tmp_path: Path) -> None:
    """The whole way on the command line: init with an asset, freeze, compile, restore, ask."""
    size = tmp_path / "size"
    size.write_bytes(struct.pack("<I", 2))
    output, baked = tmp_path / "table.cwasm", tmp_path / "table.baked.wasm"
    made = call_json("compile", TABLE, "-o", output, "--baked", baked, "--asset", f"size={size}")
    assert made["code_bytes"] == output.stat().st_size
    assert made["baked_bytes"] == baked.stat().st_size > 2 << 20
    assert made["has_tokenizer"] is True
    for file in (output, baked):
        answer = call_json("run", file, "--call", "gp_token_bytes", 7)
        assert bytes.fromhex(answer["bytes_hex"]) == struct.pack("<Q", 8 * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
        assert answer["gp_resume"] == 0
    assert call_json("run", output, "--tokenize", "héllo")["text"] == "héllo"


def test_compile_reports_handles_and_programs(tmp_path: Path) -> None:
    """What the builder would store is shown; a relative default name is beside the file."""
    module = tmp_path / "toy.wasm"
    module.write_bytes(TOY.read_bytes())
    (tmp_path / "config").write_bytes(struct.pack("<I", 5))
    tensors = ("--tensor", "embed.weight", "--tensor", "lm_head.weight")
    shown = call("compile", module, "--asset", f"config={tmp_path / 'config'}", *tensors)
    assert "lm_head.weight" in shown
    assert "PREFILL" in shown
    assert (tmp_path / "toy.cwasm").is_file()


def test_inspect_describes_each_kind_of_file(tmp_path: Path) -> None:
    """Module, compiled module, component, compiled component: kinds, sections, imports, identity."""
    files: dict[str, bytes] = {
        "guest.wasm": bytes_guest().baked_wasm,
        "guest.cwasm": compiled(bytes_guest().baked_wasm),
        "python.wasm": python_component(),
        "python.cwasm": compiled_python_component(),
    }
    reports = {}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        reports[name] = call_json("inspect", tmp_path / name)
        assert reports[name]["size_bytes"] == len(data)
        assert reports[name]["sections"]
    module = reports["guest.wasm"]
    assert module["kind"] == "module"
    assert "gp_resume(i64) -> i32" in module["exports"]
    assert "memory (memory)" in module["exports"]
    assert "log(i32, i32, i32)" in module["imports"]
    assert (module["mutable_globals"], module["has_tokenizer"], module["has_start_function"]) == (1, True, False)
    for name in ("guest.cwasm", "python.cwasm"):
        assert reports[name]["kind"] == "compiled guest"
        assert reports[name]["wasmtime"].startswith("50")  # Wasmtime writes its major version
        assert ".text" in [section["name"] for section in reports[name]["sections"]]
    assert reports["python.wasm"]["imports"] == ["glowplug:python-guest/host@0.1.0"]
    assert "tokenizer" in call("inspect", tmp_path / "guest.wasm")


def test_a_python_guest_runs_from_the_command_line(tmp_path: Path) -> None:
    """Compiled code of a component is restored and post-processes a text."""
    file = tmp_path / "python.cwasm"
    file.write_bytes(compiled_python_component())
    assert call_json("run", file, "--post-process", "mail a@b.org")["text"] == "mail [e-mail]"
    assert "post-process: " in call("run", file, "--post-process", "!raise", code=1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("inspect", __file__), "neither a WebAssembly module"),
        (("compile", TOY), "asset 'config' must hold"),
        (("compile", TOY, "--asset", "config"), "expected NAME=FILE"),
        (("run", TOY, "--call", "toy_vocabulary"), "is not in the ABI"),
        (("run", TOY, "--tokenize", "x"), "gp_resume failed with code 1"),
        (("run", TOY, "--tokenize", "x", "--call", "gp_abi"), "choose one"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: tuple[object, ...], reason: str) -> None:
    """No traceback: the reason, and an exit code."""
    result = CliRunner().invoke(main, ["guests", *map(str, arguments)])
    assert result.exit_code in (1, 2)
    assert reason in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("size", [0, 5, 63, 64, 1000, -1, -64])
def test_damaged_compiled_guests_are_described_or_refused(size: int, tmp_path: Path) -> None:
    """Cut anywhere, a file is an error of ours or is described as far as it goes; it is never loaded."""
    code = compiled(bytes_guest().baked_wasm)
    file = tmp_path / "cut.cwasm"
    file.write_bytes(code[:size])
    result = CliRunner().invoke(main, ["guests", "inspect", str(file)])
    assert result.exit_code == 1
    assert result.output.startswith("Error: n")  # "not a compiled guest", "neither a ..."
