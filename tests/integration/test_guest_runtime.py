"""Engine, module and instance: limits, deadlines, traps, compatibility, and bounds at the host's side."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from guest_fixtures import bytes_guest, compiled, sealed, toy_guest, wat_guest

from guests.compile import compile_guest, guest_identity
from guests.errors import GuestContractError, GuestError, GuestIncompatible, GuestTrap
from guests.initialise import initialise_guest
from guests.runtime import TRAP_INTERRUPT, GuestEngine, GuestInstance, GuestModule, InstanceLimits
from guests.signatures import IMPORTS
from tests.eventually import eventually_sync

WASM_PAGE_BYTES = 65_536


def load(engine: GuestEngine, baked_wasm: bytes) -> GuestModule:
    """Compile, seal and load; the mapping outlives the descriptor."""
    with sealed(compiled(baked_wasm)) as path:
        return engine.load(path)


def tokenize(instance: GuestInstance, text: bytes) -> int:
    """Call gp_tokenize the way GuestText does."""
    pointer = instance.call("gp_buffer", len(text))
    instance.write(pointer, text)
    return instance.call("gp_tokenize", pointer, len(text), 0)


def test_an_endless_loop_is_interrupted_at_its_deadline() -> None:
    """With the ticker running, a call that never returns becomes a GuestTrap that names the deadline."""
    with GuestEngine() as engine:
        module = load(engine, bytes_guest().baked_wasm)
        engine.start_ticker()
        instance = module.instantiate(InstanceLimits(call_deadline_ms=50))
        with pytest.raises(GuestTrap, match="deadline of 50 ms") as caught:
            tokenize(instance, b"spin!")
        assert caught.value.code == TRAP_INTERRUPT
        assert instance.is_closed


def test_the_deadline_counts_per_call_and_not_per_instance() -> None:
    """Many calls whose sum exceeds the deadline are fine: each call starts a new one."""
    with GuestEngine() as engine:
        module = load(engine, bytes_guest().baked_wasm)
        engine.start_ticker()
        with module.instantiate(InstanceLimits(call_deadline_ms=10_000)) as instance:
            for _ in range(100):
                assert instance.call("gp_resume", 1) == 0


def test_the_ticker_is_started_once_and_stops_with_the_engine() -> None:
    """start_ticker is idempotent; close ends the thread."""
    engine = GuestEngine()
    before = set(os.listdir("/proc/self/task"))
    engine.start_ticker()
    engine.start_ticker()
    started = set(os.listdir("/proc/self/task")) - before
    assert len(started) == 1
    engine.close()
    engine.close()
    # A thread that was joined is gone from the kernel's list a moment later.
    eventually_sync(lambda: not started & set(os.listdir("/proc/self/task")), what="the ticker's thread gone")
    with sealed(b"") as path, pytest.raises(GuestContractError, match="closed"):
        engine.load(path)


def test_the_engine_itself_starts_no_thread() -> None:
    """Creating an engine, compiling and running leaves the process single-threaded as it was, so it can be forked."""
    before = len(os.listdir("/proc/self/task"))
    with GuestEngine() as engine:
        module = load(engine, toy_guest().baked_wasm)
        with module.instantiate() as instance:
            instance.call("gp_resume", 1)
        assert len(os.listdir("/proc/self/task")) == before
        module.close()


def test_a_forked_child_uses_the_parents_engine() -> None:
    """Load, instantiate, call, trap and deadline all work in a child forked after the engine was made."""
    with GuestEngine() as engine, sealed(compile_guest(bytes_guest().baked_wasm)) as path:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                engine.start_ticker()
                module = engine.load(path)
                with module.instantiate() as instance:
                    assert tokenize(instance, b"abc") & 0xFFFF_FFFF == 3
                for attack in (b"trap!", b"spin!"):
                    try:
                        tokenize(module.instantiate(InstanceLimits(call_deadline_ms=30)), attack)
                    except GuestTrap:
                        status = 0
                    else:
                        status = 2
                        break
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_memory_growth_stops_at_the_limit() -> None:
    """memory.grow fails at the limit and the guest goes on."""
    with GuestEngine() as engine:
        module = load(engine, bytes_guest().baked_wasm)
        with module.instantiate(InstanceLimits(memory_bytes=20 * WASM_PAGE_BYTES)) as instance:
            packed = tokenize(instance, b"grow!")
            assert struct.unpack("<I", instance.read(packed >> 32, 4)) == (20,)
            assert instance.memory.size_bytes() == 20 * WASM_PAGE_BYTES
            instance.read(20 * WASM_PAGE_BYTES - 1, 1)  # grown memory is reachable
            with pytest.raises(GuestContractError, match="outside its memory"):
                instance.read(20 * WASM_PAGE_BYTES - 1, 2)


def test_a_snapshot_larger_than_the_limit_is_refused() -> None:
    """An instance whose initial memory exceeds the limit cannot be made."""
    with GuestEngine() as engine:
        module = load(engine, bytes_guest().baked_wasm)
        with pytest.raises(GuestContractError, match="memory"):
            module.instantiate(InstanceLimits(memory_bytes=WASM_PAGE_BYTES))


def test_table_growth_stops_at_the_limit() -> None:
    """table.grow gives -1 at the limit."""
    wasm = wat_guest(
        "(table $t 1 funcref)",
        query="(i64.extend_i32_s (table.grow $t (ref.null func) (local.get $which)))",
    )
    with GuestEngine() as engine:
        module = load(engine, initialise_guest(wasm, {}, []).baked_wasm)
        with module.instantiate(InstanceLimits(table_elements=100)) as instance:
            assert instance.call("gp_token_bytes", 99) == 1
            assert instance.call("gp_token_bytes", 1) == -1


@pytest.mark.parametrize("attack", [b"trap!", b"deep!"])
def test_a_trap_closes_the_instance_and_the_module_lives_on(attack: bytes) -> None:
    """After a trap the instance refuses calls and memory access; a fresh one of the same module works."""
    with GuestEngine() as engine:
        module = load(engine, bytes_guest().baked_wasm)
        instance = module.instantiate()
        with pytest.raises(GuestTrap) as caught:
            tokenize(instance, attack)
        assert caught.value.code is not None
        assert instance.is_closed
        with pytest.raises(GuestTrap, match="closed"):
            instance.call("gp_buffer", 1)
        with pytest.raises(GuestContractError, match="gone"):
            instance.read(1024, 1)
        instance.close()
        with module.instantiate() as fresh:
            assert tokenize(fresh, b"ab") & 0xFFFF_FFFF == 2


def test_imports_other_than_log_are_refused_while_serving() -> None:
    """A restored guest that asks for a tensor gets a clean error naming the function; logging is allowed."""
    with GuestEngine() as engine:
        module = load(engine, bytes_guest().baked_wasm)
        with pytest.raises(GuestContractError, match="tensor is available only while gp_init runs"):
            tokenize(module.instantiate(), b"host!")
        with module.instantiate() as instance:
            assert tokenize(instance, b"log!") & 0xFFFF_FFFF == 4
            with pytest.raises(GuestContractError, match="outside its memory"):
                tokenize(instance, b"logwild!")


def test_an_unexpected_error_of_a_host_function_travels_round_the_guest() -> None:
    """Whatever a host function raises is raised by the call, as itself, and not printed and forgotten."""

    def broken(_memory: object, *_arguments: int) -> int:
        raise KeyError("lost")

    with GuestEngine(dict.fromkeys(IMPORTS, broken)) as engine:
        module = load(engine, bytes_guest().baked_wasm)
        with pytest.raises(KeyError, match="lost"):
            tokenize(module.instantiate(), b"host!")


@pytest.mark.parametrize(
    ("pointer", "size"), [(-1, 1), (0, -1), (1 << 31, 4), ((1 << 32) - 4, 8), (0, 1 << 40), (1 << 63, 1)]
)
def test_host_reads_are_bounds_checked(pointer: int, size: int) -> None:
    """No pointer and length that a guest could return reach beyond its memory."""
    with GuestEngine() as engine:
        module = load(engine, toy_guest().baked_wasm)
        with (
            module.instantiate() as instance,
            pytest.raises(GuestContractError, match="outside its memory"),
        ):
            instance.read(pointer, size)


def test_host_writes_are_bounds_checked() -> None:
    """Writing across the end raises and writes nothing."""
    with GuestEngine() as engine:
        module = load(engine, toy_guest().baked_wasm)
        with module.instantiate() as instance:
            end = instance.memory.size_bytes()
            instance.write(end - 4, b"abcd")
            with pytest.raises(GuestContractError):
                instance.write(end - 3, b"wxyz")
            assert instance.read(end - 4, 4) == b"abcd"


def test_calls_are_checked_before_they_enter_the_guest() -> None:
    """A missing export, missing arguments and arguments out of range are errors that leave the instance usable."""
    with GuestEngine() as engine:
        module = load(engine, toy_guest().baked_wasm)
        with module.instantiate() as instance:
            with pytest.raises(GuestContractError, match="does not export the function gp_buffer"):
                instance.call("gp_buffer", 1)
            with pytest.raises(GuestContractError, match="gp_resume"):
                instance.call("gp_resume")
            with pytest.raises(GuestContractError, match="gp_resume"):
                instance.call("gp_resume", 1 << 70)
            assert instance.call("gp_resume", -(1 << 63)) == 0


def test_a_compiled_guest_with_other_types_is_not_called() -> None:
    """Export types are checked once more at load, because unchecked calls trust them."""
    code = compile_guest(
        wat_guest().replace(b"gp_token_bytes", b"gp_token_byteX").replace(b"gp_tokenize", b"gp_resumeXX")
    )
    with sealed(code) as path, GuestEngine() as engine:
        module = engine.load(path)
        with module.instantiate() as instance, pytest.raises(GuestContractError, match="does not export"):
            instance.call("gp_tokenize", 0, 0, 0)
    swapped = wat_guest().replace(b"gp_resume", b"gp_temp!!").replace(b"gp_buffer", b"gp_resume")
    with sealed(compile_guest(swapped)) as path, GuestEngine() as engine:
        module = engine.load(path)
        with module.instantiate() as instance, pytest.raises(GuestContractError, match="gp_resume is not"):
            instance.call("gp_resume", 1)


def damaged(code: bytes, how: str) -> bytes:
    """A compiled guest that must not load."""
    match how:
        case "empty":
            return b""
        case "text":
            return b"not an ELF file" * 100
        case "header only":
            return code[:64]
        case "cut in half":
            return code[: len(code) // 2]
        case "last byte missing":
            return code[:-1]
        case "other version":
            version = guest_identity()["wasmtime"].split(".")[0].encode()
            assert code.count(version) >= 1
            return code.replace(version, b"4" + version[1:])
        case _:
            raise AssertionError(how)


@pytest.mark.parametrize("how", ["empty", "text", "header only", "cut in half", "last byte missing", "other version"])
def test_a_damaged_or_foreign_compiled_guest_is_incompatible(how: str) -> None:
    """Truncated files and those of another Wasmtime are refused with GuestIncompatible, which says what to do."""
    code = compile_guest(toy_guest().baked_wasm)
    with (
        sealed(damaged(code, how)) as path,
        GuestEngine() as engine,
        pytest.raises(GuestIncompatible, match="build its snapshot again"),
    ):
        engine.load(path)


def test_a_guest_compiled_with_another_configuration_is_incompatible() -> None:
    """The wheel's default configuration differs from the pinned one, so its output is refused."""
    import wasmtime  # the reference: what somebody else's compiler would give

    code = wasmtime.Module(wasmtime.Engine(), toy_guest().baked_wasm).serialize()
    with sealed(bytes(code)) as path, GuestEngine() as engine, pytest.raises(GuestIncompatible):
        engine.load(path)


def test_only_sealed_memory_files_are_loaded(tmp_path: Path) -> None:
    """A file that could still change under the mapping is refused, on disk and in memory."""
    code = compile_guest(toy_guest().baked_wasm)
    on_disk = tmp_path / "toy.cwasm"
    on_disk.write_bytes(code)
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.write(unsealed, code)
    with GuestEngine() as engine:
        for path in (str(on_disk), f"/proc/self/fd/{unsealed}"):
            with pytest.raises(GuestError, match="not a sealed memory file"):
                engine.load(path)
    os.close(unsealed)


def test_errors_are_one_line() -> None:
    """Wasmtime's causes and backtraces end up in messages that fit a log line."""
    with GuestEngine() as engine:
        module = load(engine, bytes_guest().baked_wasm)
        with pytest.raises(GuestTrap) as caught:
            tokenize(module.instantiate(), b"deep!")
        message = str(caught.value)
        assert message.startswith("gp_tokenize: memory fault at wasm address")
        assert "wasm trap: out of bounds memory access (at 0: 0x" in message
        assert "\n" not in message
        assert len(message) < 300


def test_the_identity_names_version_target_and_configuration() -> None:
    """What a snapshot stores: strings only, and the version of the installed wheel."""
    identity = guest_identity()
    assert set(identity) == {"wasmtime", "target", "cpu_features", "config"}
    assert identity["wasmtime"].startswith("50.")
    assert all(isinstance(value, str) for value in identity.values())


def test_compiling_is_reproducible() -> None:
    """The same baked module compiles to the same bytes, so a snapshot can be checked by building it again."""
    baked = toy_guest().baked_wasm
    assert compile_guest(baked) == compile_guest(baked)
