"""Where a decode step's time goes: in NumPy's and NumKong's own code, in the Python between, in the engine around it.

    python -m worker.benchmarks.decode_step STATE_DIR NAME [--batch N] [--steps N] [--json FILE]

Steps run as they are, and, in turn with them, steps in which each call into NumPy or NumKong is timed, and steps in
which all of them but the products do nothing: the processor time that those take beside their products is Python (the
backend's lists of calls, and views made by indexing), with caches as the products leave them. The least of all
steps is shown, because other work only ever adds. The engine's share (choosing what runs, sampling, text, events) is
what a round takes beyond the backend's step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, Final

import numpy as np

from scheduler.contract.messages import SamplingParams
from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from worker.backends.numkong_cpu import NumKongBackend
from worker.backends.protocol import BoundModel
from worker.build.priming import restored_snapshot
from worker.engine.engine import Engine
from worker.engine.mailbox import Mail
from worker.engine.types import EngineRequest, RequestStep
from worker.loaded_model import LoadedModel

#: Modules whose calls into NumPy are a step's own, and what they call NumKong's functions.
BACKEND_MODULES: Final = (
    "cpu_attention",
    "cpu_attention_prompts",
    "cpu_binding",
    "cpu_buffers",
    "cpu_folding",
    "cpu_linear",
    "cpu_operations",
    "cpu_program",
)
PRODUCT_NAMES: Final = ("_dots_packed", "_dots_pack")
NUMKONG_NAMES: Final = (*PRODUCT_NAMES, "_astype", "_minmax")
#: What silenced calls give back where somebody looks at it.
SILENT_RESULTS: Final = {"dot": 1.0, "_minmax": (-1.0, 0, 1.0, 0)}
#: NumPy's functions that make arrays are never silenced.
MAKERS: Final = frozenset({"arange", "array", "empty", "full", "ones", "zeros"})
PROMPT_TOKENS: Final = 37
WARM_UP_STEPS: Final = 8
BLOCK_STEPS: Final = 8
KV_BUDGET_BYTES: Final = 1 << 29
_clock_ns: Final = time.perf_counter_ns


class KernelClock:
    """Time spent in wrapped functions since :meth:`reset`."""

    def __init__(self, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock_ns = clock_ns
        self.total_ns = 0
        self.num_calls = 0
        self.own_ns = 0  # of the wrapper itself, for each call, that lands in the total; set by calibrate
        self.around_ns = 0  # and what it adds around that

    def reset(self) -> None:
        self.total_ns = self.num_calls = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed."""
        clock_ns = self._clock_ns

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin_ns = clock_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self.total_ns += clock_ns() - begin_ns
                self.num_calls += 1

        return timed

    def calibrate(self) -> None:
        """Measure what a wrapped call of nothing adds to the total."""

        def nothing() -> None:
            pass

        wrapped = self.wrap(nothing)
        self.reset()
        plain_ns, timed_ns = (min(_time_calls(function) for _ in range(20)) for function in (nothing, wrapped))
        self.own_ns = self.total_ns // self.num_calls
        self.around_ns = max(0, timed_ns - plain_ns - self.own_ns)
        self.reset()

    def wrappers_ms(self) -> float:
        """What the wrappers added outside of the total."""
        return self.num_calls * self.around_ns / 1e6

    def elapsed_ms(self) -> float:
        """Time in the functions, without the wrappers'."""
        return (self.total_ns - self.num_calls * self.own_ns) / 1e6


def _time_calls(function: Callable[[], None]) -> int:
    """Nanoseconds of one call, loop included."""
    num_calls = 2_000
    begin_ns = _clock_ns()
    for _ in range(num_calls):
        function()
    return (_clock_ns() - begin_ns) // num_calls


class TimedNamespace:
    """NumPy as the backend's modules see it, its functions timed: ``np.multiply`` and ``np.maximum.reduce`` alike."""

    def __init__(self, target: Any, clock: KernelClock) -> None:
        self._target = target
        self._clock = clock
        self._call = clock.wrap(target) if callable(target) else None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        timed = TimedNamespace(found, self._clock) if callable(found) and not isinstance(found, type) else found
        self.__dict__[name] = timed
        return timed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self._call is not None  # only functions are wrapped with a call
        return self._call(*args, **kwargs)


class SilentNamespace:
    """NumPy as the backend's modules see it, its functions without effect."""

    def __init__(self, target: Any, result: Any = None) -> None:
        self._target = target
        self._result = result

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        is_kept = not callable(found) or isinstance(found, type) or name in MAKERS
        silent = found if is_kept else SilentNamespace(found, SILENT_RESULTS.get(name))
        self.__dict__[name] = silent
        return silent

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._result


class Mode(Enum):
    """What the backend's calls into NumPy and NumKong do."""

    PLAIN = auto()
    TIMED = auto()
    SILENT = auto()  # nothing, but for the products, whose processor time is taken


class Instruments:
    """Changes what the backend's kernels do."""

    def __init__(self, clock: KernelClock, product_clock: KernelClock) -> None:
        modules = [importlib.import_module(f"worker.backends.{name}") for name in BACKEND_MODULES]
        numpy = {Mode.PLAIN: np, Mode.TIMED: TimedNamespace(np, clock), Mode.SILENT: SilentNamespace(np)}
        self._places: list[tuple[Any, str, dict[Mode, Any]]] = []  # module, name, what stands there
        for module in modules:
            self._places.append((module, "np", numpy))
            for name in NUMKONG_NAMES:
                if hasattr(module, name):
                    plain = getattr(module, name)
                    silent = product_clock.wrap(plain) if name in PRODUCT_NAMES else SilentNamespace(plain)
                    if name in SILENT_RESULTS:
                        silent = SilentNamespace(plain, SILENT_RESULTS[name])
                    standing = {Mode.PLAIN: plain, Mode.TIMED: clock.wrap(plain), Mode.SILENT: silent}
                    self._places.append((module, name, standing))

    def set_mode(self, mode: Mode) -> None:
        """From now on."""
        for module, name, standing in self._places:
            setattr(module, name, standing[mode])


class TimedModel:
    """A bound model that adds up the time of its steps."""

    def __init__(self, bound: BoundModel) -> None:
        self._bound = bound
        self._clock = KernelClock()
        self._cpu_clock = KernelClock(time.thread_time_ns)
        self.step = self._cpu_clock.wrap(self._clock.wrap(bound.step))

    def reset(self) -> None:
        """Forget the steps so far."""
        self._clock.reset()
        self._cpu_clock.reset()

    def step_ms(self) -> float:
        """Time in the backend since the last reset."""
        return self._clock.total_ns / 1e6

    def step_cpu_ms(self) -> float:
        """Processor time of this thread in the backend since the last reset."""
        return self._cpu_clock.total_ns / 1e6

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bound, name)


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Medians, ms, where nothing else is said."""

    batch: int
    num_steps: int
    round_ms: float  # one turn of the engine: step, sampling, text
    step_ms: float  # the backend's part
    kernels_ms: float  # NumPy's and NumKong's part of that
    kernel_calls: int  # a step
    python_ms: float  # processor time of a step without kernels, less its products; the least of all steps
    engine_ms: float  # round - step


def measure_steps(loaded: LoadedModel, batch: int, num_steps: int, num_threads: int = 0) -> StepFigures:
    """Figures of decode steps with ``batch`` sequences after a prompt of 37 tokens each."""
    backend = NumKongBackend(num_threads)
    backend.warm()
    model = TimedModel(backend.bind(loaded.plan))
    engine = Engine(
        loaded,
        model,
        max_running=batch,
        kv_budget_bytes=KV_BUDGET_BYTES,
        on_steps=_require_no_error,
    )
    requests = [_make_request(loaded, index, num_steps) for index in range(batch)]
    engine.run_round(Mail(requests=[*requests]))
    while engine.statistics().tokens_generated < batch * WARM_UP_STEPS:
        engine.run_round(Mail())
    clock, product_clock = KernelClock(), KernelClock(time.thread_time_ns)
    clock.calibrate()
    product_clock.calibrate()
    instruments = Instruments(clock, product_clock)
    rounds: list[float] = []
    steps: list[float] = []
    kernels: list[float] = []
    pythons: list[float] = []
    calls = 0
    for index in range(num_steps):
        mode = list(Mode)[index // BLOCK_STEPS % len(Mode)]
        instruments.set_mode(mode)
        for each in (clock, product_clock, model):
            each.reset()
        begin_ns = _clock_ns()
        engine.run_round(Mail())
        elapsed_ms = (_clock_ns() - begin_ns) / 1e6
        if mode is Mode.PLAIN:
            rounds.append(elapsed_ms)
            steps.append(model.step_ms())
        elif mode is Mode.TIMED:
            kernels.append(clock.elapsed_ms())
            calls = clock.num_calls
        else:
            pythons.append(model.step_cpu_ms() - product_clock.total_ns / 1e6 - product_clock.wrappers_ms())
    instruments.set_mode(Mode.PLAIN)
    round_ms, step_ms, kernels_ms = (statistics.median(values) for values in (rounds, steps, kernels))
    return StepFigures(batch, num_steps, round_ms, step_ms, kernels_ms, calls, min(pythons), round_ms - step_ms)


def _require_no_error(steps: list[RequestStep]) -> None:
    for step in steps:
        if step.finished:
            raise RuntimeError(f"a sequence ended during the measurement: {step.error or 'out of tokens'}")


def _make_request(loaded: LoadedModel, index: int, num_steps: int) -> EngineRequest:
    first = 1_000 + 97 * index
    prompt = tuple((first + token) % loaded.plan.vocab_size for token in range(PROMPT_TOKENS))
    max_tokens = num_steps + WARM_UP_STEPS + 8
    sampling = SamplingParams(seed=0, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return EngineRequest(f"decode-{index}", prompt, sampling)


def show(figures: StepFigures) -> str:
    """One line."""
    return (
        f"batch {figures.batch}: round {figures.round_ms:.2f} ms = kernels {figures.kernels_ms:.2f} "
        f"({figures.kernel_calls} calls) + python {figures.python_ms:.2f} + engine {figures.engine_ms:.2f} ms"
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker.benchmarks.decode_step", description=__doc__)
    parser.add_argument("state_dir", type=Path, help="as `glowplug build --state-dir` left it")
    parser.add_argument("name", help="the snapshot")
    parser.add_argument("--batch", type=int, action="append", help="sequences in a step (default: 1 and 8)")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--threads", type=int, default=0, help="of the products (default: one for each core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args(arguments)
    keyring = KeyRing.from_file(options.state_dir / "keys" / "snapshot.keys")
    store = SnapshotStore(options.state_dir / "store")
    results = []
    with restored_snapshot(store.read_manifest(options.name, keyring), store, keyring) as restored:
        for batch in options.batch or (1, 8):
            figures = measure_steps(restored.loaded, batch, options.steps, options.threads)
            print(f"{options.name}, {show(figures)}", flush=True)
            results.append(asdict(figures))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
