"""Ahead-of-time compilation with one pinned engine configuration.

Wasmtime refuses a compiled module whose configuration differs from the loading engine's in any way, so compiling
and loading share :func:`new_engine`. Code is compiled for a named baseline target instead of the building machine's
CPU: a snapshot made on one host runs on every other of its kind, and its identity holds no CPU model.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Callable
from ctypes import byref, c_bool, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from guests import binding
from guests.confined_work import CompileTask, DoneReply, run_confined
from guests.confinement import WorkLimits
from guests.errors import GuestError, GuestModuleRefused, GuestProcessError
from guests.module import MAX_BAKED_BYTES, parse_module

MAX_WASM_STACK_BYTES: Final = 512 << 10  # a thread that runs a guest needs at least twice that of C stack
MEMORY_RESERVATION_BYTES: Final = 4 << 30  # all of wasm32: the base never moves and bounds checks are free


@dataclass(frozen=True, slots=True)
class CompileTarget:
    """Baseline that guest code is compiled for. ``features`` are Cranelift flags the host CPU must have."""

    triple: str
    features: tuple[str, ...]


# x86-64-v2, the floor of every server CPU since 2009, is what 128-bit SIMD code needs to be compact.
TARGETS: Final = {
    "x86_64": CompileTarget(
        "x86_64-unknown-linux-gnu",
        ("has_sse3", "has_ssse3", "has_sse41", "has_sse42", "has_popcnt", "has_cmpxchg16b"),
    ),
    "aarch64": CompileTarget("aarch64-unknown-linux-gnu", ()),
}

# Proposals that guests do not need, or that the snapshotter could not restore, are off: less code to trust.
BOOLEAN_SETTINGS: Final = {
    "epoch_interruption": True,
    "memory_may_move": False,
    "memory_init_cow": True,
    "parallel_compilation": False,  # its thread pool does not exist after fork(): compiling there would hang
    "native_unwind_info": False,
    "shared_memory": False,
    "concurrency_support": False,
    "gc_support": False,
    "wasm_bulk_memory": True,
    "wasm_reference_types": True,
    "wasm_simd": True,
    "wasm_branch_hinting": False,
    "wasm_compact_imports": False,
    "wasm_component_model": False,
    "wasm_component_model_async": False,
    "wasm_component_model_map": False,
    "wasm_custom_page_sizes": False,
    "wasm_exceptions": False,
    "wasm_function_references": False,
    "wasm_gc": False,
    "wasm_memory64": False,
    "wasm_multi_memory": False,
    "wasm_relaxed_simd": False,
    "wasm_stack_switching": False,
    "wasm_tail_call": False,
    "wasm_threads": False,
    "wasm_wide_arithmetic": False,
}


#: What differs for components. Their memory cannot be captured, so nothing here concerns the snapshotter.
COMPONENT_SETTINGS: Final = {"wasm_component_model": True}

COMPILE_LIMITS: Final = WorkLimits(wall_s=600.0, cpu_s=600)


class _CompilerFunctions(NamedTuple):
    name: str
    new: Callable[..., Any]
    serialize: Callable[..., Any]
    delete: Callable[..., Any]


MODULE_FUNCTIONS: Final = _CompilerFunctions(
    "module", binding.module_new, binding.module_serialize, binding.module_delete
)
COMPONENT_FUNCTIONS: Final = _CompilerFunctions(
    "component", binding.component_new, binding.component_serialize, binding.component_delete
)


def compile_target() -> CompileTarget:
    """The target of this machine.

    Raises:
        GuestError: an architecture that guests are not compiled for.
    """
    machine = platform.machine()
    if machine not in TARGETS:
        raise GuestError(f"guests run on {' and '.join(TARGETS)}; this machine is {machine}")
    return TARGETS[machine]


def new_engine(*, is_component: bool = False) -> int:
    """A ``wasm_engine_t`` with the pinned configuration; the caller deletes it. Starts no thread. ``is_component``:
    for Python guests, which need a little more of Wasmtime.

    Raises:
        GuestError: see :func:`compile_target`.
    """
    target = compile_target()
    config = binding.config_new()
    settings = BOOLEAN_SETTINGS | COMPONENT_SETTINGS if is_component else BOOLEAN_SETTINGS
    for name, value in settings.items():
        binding.config_setter(name, c_bool)(config, value)
    binding.config_setter("max_wasm_stack", c_size_t)(config, MAX_WASM_STACK_BYTES)
    binding.config_setter("memory_reservation", c_uint64)(config, MEMORY_RESERVATION_BYTES)
    error = binding.config_target_set(config, target.triple.encode())
    binding.check(error, GuestError, f"Wasmtime cannot compile for {target.triple}")
    for feature in target.features:
        binding.config_cranelift_flag_enable(config, feature.encode())
    engine: int = binding.engine_new_with_config(config)  # takes the config
    return engine


@functools.cache
def guest_identity() -> dict[str, str]:
    """What a compiled guest depends on; a snapshot stores it and is refused where it differs.

    Treat the result as read-only. Cost: reads one metadata file, once per process.
    """
    import importlib.metadata  # 18 ms, which confined processes do not need

    target = compile_target()
    settings = [f"{name}={value}" for name, value in sorted(BOOLEAN_SETTINGS.items())]
    settings += [f"max_wasm_stack={MAX_WASM_STACK_BYTES}", f"memory_reservation={MEMORY_RESERVATION_BYTES}"]
    return {
        "wasmtime": importlib.metadata.version("wasmtime"),
        "target": target.triple,
        "cpu_features": " ".join(target.features),
        "config": hashlib.sha256("\n".join(settings).encode()).hexdigest()[:16],
    }


def compile_module(engine: int, wasm: bytes) -> int:
    """Validate and compile ``wasm``: a ``wasmtime_module_t`` that the caller deletes.

    Raises:
        GuestModuleRefused: invalid WebAssembly, or a proposal that is switched off; Wasmtime's reason is included.
    """
    module = c_void_p()
    error = binding.module_new(engine, wasm, len(wasm), byref(module))
    binding.check(error, GuestModuleRefused, "Wasmtime refused the module")
    assert module.value is not None  # set whenever there is no error
    return module.value


def compile_guest(baked_wasm: bytes, *, limits: WorkLimits = COMPILE_LIMITS) -> bytes:
    """Machine code (``.cwasm``) of a baked guest, for :meth:`guests.runtime.GuestEngine.load`.

    Parsed by our own parser first, then compiled by a confined process. Cost: 0.1 s for the process, about 5 ms a MiB
    of baked memory, and code generation; blocks. The result is native code: whoever loads it must have verified where
    it comes from.

    Raises:
        GuestModuleRefused: the module does not validate.
        GuestProcessError: the compiler crashed or ran into ``limits``.
    """
    parse_module(baked_wasm, max_bytes=MAX_BAKED_BYTES)
    reply, attachments = run_confined(CompileTask((len(baked_wasm),)), [baked_wasm], limits)
    if not isinstance(reply, DoneReply) or len(attachments) != 1:
        raise GuestProcessError("the guest's confined process gave the reply of another task")
    return attachments[0]


def compile_in_process(wasm: bytes, *, is_component: bool = False) -> bytes:
    """What :func:`compile_guest` has done elsewhere: for the confined process, and for modules of one's own.

    Raises:
        GuestModuleRefused: the module does not validate.
    """
    engine = new_engine(is_component=is_component)
    kind = COMPONENT_FUNCTIONS if is_component else MODULE_FUNCTIONS
    compiled = c_void_p()
    try:
        error = kind.new(engine, wasm, len(wasm), byref(compiled))
        binding.check(error, GuestModuleRefused, f"Wasmtime refused the {kind.name}")
        del wasm
        try:
            code = binding.ByteVector()
            error = kind.serialize(compiled, byref(code))
            binding.check(error, GuestError, f"cannot serialise the compiled {kind.name}")
            return binding.take_bytes(code)
        finally:
            kind.delete(compiled)
    finally:
        binding.engine_delete(engine)
