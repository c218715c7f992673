"""Parsers of foreign bytes: arbitrary, mutated and greedy inputs give a value or our own error, at bounded cost."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.parser_targets import TARGETS, scratch
from tests.fuzz.seeds import good_inputs, greedy_inputs

#: Address space that a process may take on top of what it has when the greedy inputs begin, and CPU time for all.
GREEDY_BYTES = 192 * 1024 * 1024
GREEDY_CPU_S = 20


@pytest.fixture(scope="module", autouse=True)
def _scratch_folder() -> Iterator[None]:
    """Made by the first target that needs files, removed at the end."""
    yield
    shutil.rmtree(scratch(), ignore_errors=True)
    for cached in (scratch, good_inputs, greedy_inputs):
        cached.cache_clear()


@st.composite
def changed(draw: st.DrawFn, target: str) -> bytes:
    """A good input with a few bytes replaced, cut, doubled or inserted; or bytes of any kind."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=400))
    data = bytearray(draw(st.sampled_from(good_inputs()[target])))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 2, 4, 8, 64])))
        data[start:end] = draw(
            st.one_of(st.binary(max_size=9), st.sampled_from([bytes(data[start:end]) * 2, b"\xff" * 8]))
        )
    return bytes(data)


@pytest.mark.parametrize("target", TARGETS)
def test_good_inputs_reach_the_parser(target: str) -> None:
    """Each target has inputs to start from, and takes them."""
    assert good_inputs()[target]
    for data in good_inputs()[target]:
        TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
def test_threat_any_bytes_in_a_parser(target: str) -> None:
    """Arbitrary bytes and changes of good ones, within 2 s of CPU each."""

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(data=changed(target))
    def attack(data: bytes) -> None:
        began_s = time.process_time()
        TARGETS[target](data)
        assert time.process_time() - began_s < 2

    attack()


def test_greedy_inputs_cost_little() -> None:
    """Counts, sizes and nesting at the limits of their fields: neither memory nor time is spent on a claim."""
    script = (
        "import resource, sys\n"
        "from tests.fuzz.parser_targets import TARGETS\n"
        "from tests.fuzz.seeds import good_inputs, greedy_inputs\n"
        "for target, inputs in good_inputs().items():\n"
        "    for data in inputs: TARGETS[target](data)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        f"limit = pages * {resource.getpagesize()} + {GREEDY_BYTES}\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        f"resource.setrlimit(resource.RLIMIT_CPU, ({GREEDY_CPU_S}, {GREEDY_CPU_S}))\n"
        "count = 0\n"
        "for target, inputs in greedy_inputs().items():\n"
        "    for data in inputs: TARGETS[target](data); count += 1\n"
        "import shutil; from tests.fuzz.parser_targets import scratch; shutil.rmtree(scratch())\n"
        "print(count)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 80
