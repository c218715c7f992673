"""Python guests: built by componentize-py, compiled ahead of time, restored, and confined like guests in C."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guest_fixtures import sealed

from guests.compile import compile_guest
from guests.component import HOST_INTERFACE, ComponentEngine, PostProcessor, compile_component
from guests.component_format import PREAMBLE, parse_component
from guests.errors import GuestContractError, GuestError, GuestIncompatible, GuestModuleRefused, GuestTrap
from guests.python_build import build_component, main
from guests.runtime import TRAP_INTERRUPT, InstanceLimits
from guests.shipped import toy_wasm
from guests.wasm_format import encode_name, encode_u32, encode_vector
from tests.python_guest_fixtures import compiled_python_component, python_component

LIMITS = InstanceLimits(memory_bytes=64 << 20, call_deadline_ms=300, result_bytes=1 << 20)
SEED = (1 << 64) - 5


@pytest.fixture(scope="module")
def engine() -> Iterator[ComponentEngine]:
    """With deadlines that pass."""
    with ComponentEngine() as made:
        made.start_ticker()
        yield made


@pytest.fixture(scope="module")
def component(engine: ComponentEngine) -> Iterator[Any]:
    """The example, loaded from sealed memory."""
    with sealed(compiled_python_component()) as path:
        loaded = engine.load(path)
    yield loaded
    loaded.close()


@pytest.fixture
def guest(engine: ComponentEngine, component: Any) -> Iterator[PostProcessor]:
    """A restored instance."""
    made = PostProcessor(engine, component, SEED, LIMITS)
    yield made
    made.close()


def assert_serves(guest: PostProcessor) -> None:
    """The example's own behaviour."""
    assert guest.post_process("ask bob.s@mail.example.com  \nid 1234567") == "ask [e-mail]\nid #######"


def test_the_example_masks_text(guest: PostProcessor) -> None:
    """What its module level made at build is there: patterns and tables; text of any kind survives the way."""
    assert_serves(guest)
    assert guest.post_process("") == ""
    assert guest.post_process("grüße \u4f60\u597d \U0001f680") == "grüße \u4f60\u597d \U0001f680"
    assert guest.post_process("lone \ud800 surrogate") == "lone \ufffd surrogate"


def test_each_instance_starts_from_the_built_state(engine: ComponentEngine, component: Any) -> None:
    """Instances share nothing, and resume gives each its seed."""
    first, second = PostProcessor(engine, component, SEED, LIMITS), PostProcessor(engine, component, 7, LIMITS)
    assert [first.post_process("!calls") for _ in range(3)] == ["1", "2", "3"]
    assert second.post_process("!calls") == "1"
    assert (first.post_process("!seed"), second.post_process("!seed")) == (str(SEED), "7")
    first.close()
    second.close()


@pytest.mark.parametrize(
    "attack",
    ["!raise", "!deep", "!memory", "!memory slowly", "!clock", "!random", "!file", "!socket", "!log"],
)
def test_what_a_python_guest_may_not_do_ends_its_call(guest: PostProcessor, attack: str) -> None:
    """Exceptions, recursion, memory, clock, randomness, files, sockets: a GuestError, and the next call is right."""
    for _ in range(2):
        with pytest.raises(GuestError):
            guest.post_process(attack)
        assert_serves(guest)
        assert guest.post_process("!calls") == "2"  # on a fresh instance


def test_a_python_guest_that_loops_is_interrupted(guest: PostProcessor) -> None:
    """The deadline is that of every guest."""
    with pytest.raises(GuestTrap, match="deadline of 300 ms") as caught:
        guest.post_process("!spin")
    assert caught.value.code == TRAP_INTERRUPT
    assert_serves(guest)


def test_a_python_guest_sees_no_environment_and_may_log(guest: PostProcessor) -> None:
    """No variable of this process reaches it; five thousand log lines are no error."""
    os.environ["GLOWPLUG_TEST_SECRET"] = "secret"
    assert "secret" not in guest.post_process("!environment")
    assert guest.post_process("!log flood") == "logged"


def test_an_answer_that_is_too_long_is_refused(guest: PostProcessor) -> None:
    """More than the limit of bytes is not passed on."""
    with pytest.raises(GuestContractError, match="5242880 bytes"):
        guest.post_process("!long")
    assert_serves(guest)


def test_the_limit_of_an_answer_counts_bytes(engine: ComponentEngine, component: Any) -> None:
    """As many letters as bytes are allowed, each of which takes two."""
    guest = PostProcessor(engine, component, SEED, InstanceLimits(call_deadline_ms=5_000, result_bytes=1_000))
    assert guest.post_process("e" * 1_000) == "e" * 1_000
    with pytest.raises(GuestContractError, match="2000 bytes: at most 1000"):
        guest.post_process("\u00e9" * 1_000)
    guest.close()


def test_a_resume_that_raises_makes_no_post_processor(engine: ComponentEngine, component: Any) -> None:
    """The error comes at restore, not at the first request."""
    with pytest.raises(GuestTrap, match="resume"):
        PostProcessor(engine, component, 33, LIMITS)


def test_a_component_that_does_not_fit_is_refused(engine: ComponentEngine, component: Any) -> None:
    """Its initial memory exceeds the limit."""
    with pytest.raises(GuestContractError, match="memory"):
        PostProcessor(engine, component, 1, InstanceLimits(memory_bytes=1 << 20))


def test_closed_means_closed(engine: ComponentEngine, component: Any) -> None:
    """close is idempotent, and no fresh instance is made afterwards."""
    guest = PostProcessor(engine, component, 1, LIMITS)
    guest.close()
    guest.close()
    with pytest.raises(GuestContractError, match="closed"):
        guest.post_process("x")


def test_restoring_a_python_guest_leaks_nothing(engine: ComponentEngine, component: Any) -> None:
    """A hundred restores: descriptors and mappings as before."""

    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())

    PostProcessor(engine, component, 1, LIMITS).close()
    before = counts()
    for _ in range(100):
        PostProcessor(engine, component, 1, LIMITS).close()
    after = counts()
    print(f"descriptors, mappings: {before} before, {after} after")
    assert after[0] == before[0]
    assert after[1] <= before[1] + 5


def test_only_sealed_components_of_this_kind_are_loaded(engine: ComponentEngine, tmp_path: Path) -> None:
    """A file on disk and a compiled core module are refused."""
    on_disk = tmp_path / "guest.cwasm"
    on_disk.write_bytes(b"x")
    with pytest.raises(GuestError, match="not a sealed memory file"):
        engine.load(str(on_disk))
    with sealed(compile_guest(toy_wasm())) as path, pytest.raises(GuestIncompatible):
        engine.load(path)


def test_the_component_imports_nothing_but_log() -> None:
    """--stub-wasi leaves no WASI import; both exports are there."""
    outline = parse_component(python_component())
    assert outline.imports == (HOST_INTERFACE,)
    assert set(outline.exports) >= {"resume", "post-process"}  # and what wires the stubs


def section(number: int, items: list[bytes]) -> bytes:
    """One section of a component that holds a vector."""
    body = encode_vector(items)
    return bytes([number]) + encode_u32(len(body)) + body


HOSTILE: dict[str, tuple[bytes, str]] = {
    "a core module": (toy_wasm(), "not a WebAssembly component"),
    "nothing": (b"", "not a WebAssembly component"),
    "WASI": (
        PREAMBLE + section(10, [b"\0" + encode_name("wasi:clocks/wall-clock@0.2.0") + b"\5\0"]),
        "imports wasi:clocks/wall-clock@0.2.0",
    ),
    "no exports": (PREAMBLE, "does not export post-process, resume"),
    "start function": (PREAMBLE + b"\x09\3\0\0\0", "start function"),
    "unknown section": (PREAMBLE + b"\x20\0", "section 32"),
    "section cut short": (PREAMBLE + b"\1\x7f", "127 bytes wanted"),
    "a billion imports": (PREAMBLE + b"\x0a\5" + encode_u32(10**9), "at most 1000"),
    "import of no sort": (PREAMBLE + section(10, [b"\0" + encode_name("x") + b"\x17\0"]), "sort 0x17"),
    "import name of no form": (PREAMBLE + section(10, [b"\7" + encode_name("x")]), "name of form 0x7"),
    "exports that do not validate": (
        PREAMBLE + section(11, [b"\0" + encode_name(name) + b"\1\0\0" for name in ("resume", "post-process")]),
        "Wasmtime refused the component",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_components_are_refused(name: str) -> None:
    """By our own parser, or at the latest by the compiler in its confined process."""
    component, reason = HOSTILE[name]
    with pytest.raises(GuestModuleRefused, match=reason):
        compile_component(component)


def test_a_python_guest_with_an_error_does_not_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the tool says reaches the person who builds."""
    (tmp_path / "guest.wit").write_text("package glowplug:python-guest@0.1.0;\nworld post-processor {\n")
    (tmp_path / "app.py").write_text("x = 1\n")
    with pytest.raises(GuestError, match=r"guest\.wit"):
        build_component(tmp_path)
    assert main([str(tmp_path), "-o", str(tmp_path / "out.wasm")]) == 1
    assert "building the Python guest" in capsys.readouterr().err
