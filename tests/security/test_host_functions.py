"""Every argument of every host function, with every hostile value: generated from the ABI's table of imports."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Mapping

import pytest
import wasmtime

from guests.errors import GuestContractError, GuestError
from guests.initialisation import InitialisationHost
from guests.linker import HostFunction
from guests.runtime import GuestEngine, GuestInstance, GuestModule
from guests.serving_host import serving_functions
from guests.signatures import IMPORTS, KIND_I64, Signature

SIZE = 65_536
ARGUMENTS_AT = 64  # 16 bytes apart; the result is written to 0
NAME_AT, NAME = 1024, b"config"
SCRATCH_AT = 2048
ASSET = b"0123456789abcdef"
SHAPE_AT, SHAPE = 3072, struct.pack("<II", 2, 3)
CANARY_AT, CANARY = 4096, b"unchanged"
POINTERS = (0, 1, SIZE - 1, SIZE, SIZE + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
LENGTHS = (0, 1, SIZE - 1, SIZE, SIZE + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
OVERFLOWS = ((1 << 31, 1 << 31), ((1 << 32) - 1, 2), ((1 << 32) - 4, 8), (SIZE - 4, 8), (2, (1 << 32) - 1))
NUMBERS = {
    False: (0, 1, 3, 4, 255, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
    True: (0, 1, len(ASSET), -1, (1 << 31), (1 << 32), (1 << 63) - 1, -(1 << 63)),
}
RANGES = [(name, number) for name, signature in IMPORTS.items() for number in range(len(signature.ranges))]


def caller_wasm() -> bytes:
    """A module that calls each import with arguments out of its memory."""
    types = {False: "i32", True: "i64"}
    imports, calls = [], []
    for name, signature in IMPORTS.items():
        params = " ".join(types[kind == KIND_I64] for kind in signature.params)
        result = "" if signature.result is None else f"(result {types[signature.result == KIND_I64]})"
        imports.append(f'(import "glowplug" "{name}" (func ${name} (param {params}) {result}))')
        loads = " ".join(
            f"({types[kind == KIND_I64]}.load (i32.const {ARGUMENTS_AT + 16 * i}))"
            for i, kind in enumerate(signature.params)
        )
        call = f"(call ${name} {loads})"
        if signature.result is not None:
            call = f"({types[signature.result == KIND_I64]}.store (i32.const 0) {call})"
        calls.append(f'(func (export "call_{name}") {call})')
    return bytes(wasmtime.wat2wasm(f'(module {"".join(imports)} (memory (export "memory") 1 1) {"".join(calls)})'))


def benign(name: str) -> list[int]:
    """Arguments that are right."""
    return {
        "log": [1, NAME_AT, len(NAME)],
        "asset_size": [NAME_AT, len(NAME)],
        "asset_read": [NAME_AT, len(NAME), 0, SCRATCH_AT, len(ASSET)],
        "tensor": [NAME_AT, len(NAME)],
        "tensor_alloc": [SCRATCH_AT, 4, 0, SHAPE_AT, 8],
        "tensor_write": [0, 0, SCRATCH_AT, 8],
        "program": [SCRATCH_AT, 80],
    }[name]


@pytest.fixture(params=["initialising", "serving"])
def caller(request: pytest.FixtureRequest) -> Iterator[GuestModule]:
    """The calling guest, linked with either set of host functions."""
    functions: Mapping[str, HostFunction] = serving_functions()
    if request.param == "initialising":
        functions = InitialisationHost({NAME.decode(): ASSET}, [NAME.decode()]).functions()
    with GuestEngine(functions) as engine:
        module = engine.compile(caller_wasm())
        yield module
        module.close()


def call(module: GuestModule, name: str, arguments: list[int]) -> GuestError | None:
    """Call an import from a fresh instance; what it raised. Memory that no argument names stays as it was."""
    with module.instantiate() as instance:
        prepare(instance, IMPORTS[name], arguments)
        try:
            instance.call_unlisted(f"call_{name}")
        except GuestError as error:
            assert instance.is_closed
            return error
        assert instance.read(CANARY_AT, len(CANARY)) == CANARY
        return None


def prepare(instance: GuestInstance, signature: Signature, arguments: list[int]) -> None:
    """Write what the call needs into memory."""
    instance.write(NAME_AT, NAME)
    instance.write(CANARY_AT, CANARY)
    instance.write(SHAPE_AT, SHAPE)
    for i, (kind, value) in enumerate(zip(signature.params, arguments, strict=True)):
        instance.write(ARGUMENTS_AT + 16 * i, struct.pack("<q" if kind == KIND_I64 else "<I", value))


@pytest.mark.parametrize(("name", "number"), RANGES)
def test_threat_guest_pointers(caller: GuestModule, name: str, number: int) -> None:
    """Each range of each import: everything that leaves memory is refused as such, whatever the other arguments."""
    pointer, length = IMPORTS[name].ranges[number]
    num_refused = 0
    for start, size in [*itertools.product(POINTERS, LENGTHS), *OVERFLOWS]:
        arguments = benign(name)
        arguments[pointer], arguments[length] = start, size
        error = call(caller, name, arguments)
        if start + size > SIZE:
            assert isinstance(error, GuestContractError), (name, start, size)
            assert "outside its memory" in str(error), (name, start, size)
            num_refused += 1
    assert num_refused >= 40


def test_every_other_argument_may_be_anything(caller: GuestModule) -> None:
    """Levels and offsets of every size give an answer or a GuestError, and the next guest is not affected."""
    for name, signature in IMPORTS.items():
        in_ranges = {index for pair in signature.ranges for index in pair}
        for index in set(range(len(signature.params))) - in_ranges:
            for value in NUMBERS[signature.params[index] == KIND_I64]:
                arguments = benign(name)
                arguments[index] = value
                call(caller, name, arguments)
    assert call(caller, "log", benign("log")) is None


def test_ranges_that_overlap_are_harmless(caller: GuestModule) -> None:
    """All ranges of asset_read hostile at once: an answer or a GuestError for each combination."""
    values = (0, 1, SIZE - 8, SIZE, 1 << 31, (1 << 32) - 1)
    num_answered = 0
    for name_at, name_size, destination, size in itertools.product(values, repeat=4):
        error = call(caller, "asset_read", [name_at, name_size, 0, destination, size])
        if name_at + name_size > SIZE or destination + size > SIZE:
            assert isinstance(error, GuestContractError)
        num_answered += error is None
    assert num_answered < 6**4


def test_every_import_says_what_its_pointers_are() -> None:
    """A new import cannot forget its ranges: an i32 outside of one must be listed here as a plain number."""
    plain = {("log", 0), ("tensor_alloc", 2), ("tensor_write", 0)}
    for name, signature in IMPORTS.items():
        in_ranges = {index for pair in signature.ranges for index in pair}
        for index, kind in enumerate(signature.params):
            assert kind == KIND_I64 or index in in_ranges or (name, index) in plain


def test_right_arguments_give_right_answers() -> None:
    """The calling guest itself works: what is refused above is refused for its arguments."""
    host = InitialisationHost({NAME.decode(): ASSET}, [NAME.decode()])
    with GuestEngine(host.functions()) as engine:
        module = engine.compile(caller_wasm())
        with module.instantiate() as instance:
            for name, expected in (("asset_size", len(ASSET)), ("asset_read", len(ASSET)), ("tensor", 0)):
                prepare(instance, IMPORTS[name], benign(name))
                instance.call_unlisted(f"call_{name}")
                assert struct.unpack("<I", instance.read(0, 4)) == (expected,)
            assert instance.read(SCRATCH_AT, len(ASSET)) == ASSET
        module.close()
    assert host.host_bytes == len(NAME)


def test_what_the_host_keeps_for_a_guest_is_counted_and_bounded() -> None:
    """Log lines are counted in bytes and in lines; names count once, however often they are asked for."""
    host = InitialisationHost({}, [NAME.decode()])
    with GuestEngine(host.functions()) as engine:
        module = engine.compile(caller_wasm())
        with module.instantiate() as instance:
            prepare(instance, IMPORTS["tensor"], benign("tensor"))
            for _ in range(10):
                instance.call_unlisted("call_tensor")
            assert host.host_bytes == len(NAME)
            prepare(instance, IMPORTS["log"], [0, 0, SIZE])
            for _ in range(1_000):
                instance.call_unlisted("call_log")
            assert host.host_bytes == len(NAME) + 1_000 * 4_096
            with pytest.raises(GuestContractError, match="more than 1000 lines"):
                instance.call_unlisted("call_log")
        module.close()
