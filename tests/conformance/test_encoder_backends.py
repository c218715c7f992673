"""One suite for every backend's encoders: each must agree with the float32 reference, and batches must not matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from guests.abi import NO_TENSOR, NO_VALUE, Opcode, ProgramKind
from guests.program import Operation, Program
from worker.backends.cpu_encoder import bind_gelu
from worker.backends.encoder_protocol import EncoderPlan
from worker.backends.numkong_cpu import NumKongBackend
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import Backend, BackendError, FloatArray, ModelPlan, WeightTensor

BACKENDS: dict[str, Callable[[], Backend]] = {
    "numpy": NumpyBackend,
    "numkong": NumKongBackend,
    "numkong-1-thread": lambda: NumKongBackend(1),
}
#: Largest difference of a vector of length 1 that a stored type may cause.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}
VOCABULARY, WIDTH, HEADS, INNER, CONTEXT = 50, 32, 4, 64, 96


class _Recorder:
    """Operations and tensors of a plan, as they are added."""

    def __init__(self, dtype: str, seed: int) -> None:
        self.operations: list[Operation] = []
        self.tensors: list[WeightTensor] = []
        self._dtype = dtype
        self._random = np.random.default_rng(seed)

    def tensor(self, *shape: int, about: float = 0.0) -> int:
        data: npt.NDArray[Any] = (self._random.standard_normal(shape) * 0.2 + about).astype(np.float32)
        if len(shape) == 2 and self._dtype == "bfloat16":
            data = data.astype(ml_dtypes.bfloat16)
        self.tensors.append(WeightTensor(f"t{len(self.tensors)}", data))
        return len(self.tensors) - 1

    def add(
        self,
        opcode: Opcode,
        out: int,
        inputs: tuple[int, ...] = (),
        tensors: tuple[int, ...] = (),
        ints: tuple[int, ...] = (),
        first_float: float = 0.0,
    ) -> None:
        fill = (*inputs, NO_VALUE, NO_VALUE)[:2], (*tensors, *(NO_TENSOR,) * 3)[:3], (*ints, *(0,) * 6)[:6]
        self.operations.append(Operation(opcode, out, *fill, (first_float, 0.0)))  # type: ignore[arg-type]


def encoder_plan(dtype: str = "float32", seed: int = 0) -> EncoderPlan:
    """A random one-layer BERT with every operation that encoders have."""
    recorder = _Recorder(dtype, seed)
    norm = lambda: (recorder.tensor(WIDTH, about=1.0), recorder.tensor(WIDTH))  # noqa: E731 (a name for two tensors)
    recorder.add(Opcode.EMBED, 0, (), (recorder.tensor(VOCABULARY, WIDTH),))
    recorder.add(Opcode.POSITION_EMBED, 1, (), (recorder.tensor(CONTEXT, WIDTH),))
    recorder.add(Opcode.ADD, 2, (0, 1))
    recorder.add(Opcode.LAYER_NORM, 0, (2,), norm(), (), 1e-12)
    qkv = (recorder.tensor(3 * WIDTH, WIDTH), recorder.tensor(3 * WIDTH))
    recorder.add(Opcode.LINEAR, 3, (0,), qkv, (3 * WIDTH,))
    recorder.add(Opcode.ENCODER_ATTENTION, 4, (3,), (), (HEADS, WIDTH // HEADS), (WIDTH // HEADS) ** -0.5)
    recorder.add(Opcode.ADD, 2, (0, 4))
    recorder.add(Opcode.LAYER_NORM, 0, (2,), norm(), (), 1e-12)
    recorder.add(Opcode.LINEAR, 5, (0,), (recorder.tensor(INNER, WIDTH), recorder.tensor(INNER)), (INNER,))
    recorder.add(Opcode.GELU, 6, (5,))
    recorder.add(Opcode.LINEAR, 4, (6,), (recorder.tensor(WIDTH, INNER), recorder.tensor(WIDTH)), (WIDTH,))
    recorder.add(Opcode.MEAN_POOL, 7, (4,))
    recorder.add(Opcode.L2_NORMALISE, 8, (7,), (), (), 1e-12)
    recorder.add(Opcode.OUTPUT, NO_VALUE, (8,))
    program = Program(ProgramKind.ENCODE, 9, tuple(recorder.operations))
    return EncoderPlan(program, tuple(recorder.tensors), VOCABULARY, CONTEXT, WIDTH)


def sequences_of(lengths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    chance = np.random.default_rng(sum(lengths))
    return tuple(tuple(chance.integers(0, VOCABULARY, length).tolist()) for length in lengths)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = BACKENDS[request.param]()
    return made


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [(1,), (7,), (96,), (3, 1, 40), (5,) * 30, (96, 2, 17, 64)], ids=str)
def test_vectors_equal_the_references(backend: Backend, dtype: str, lengths: tuple[int, ...]) -> None:
    """Single tokens, whole contexts, and batches of mixed lengths; every vector has length 1."""
    plan = encoder_plan(dtype)
    sequences = sequences_of(lengths)
    found = backend.bind_encoder(plan).encode(sequences)
    expected = NumpyBackend().bind_encoder(plan).encode(sequences)
    assert found.shape == (len(lengths), WIDTH)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_a_vector_does_not_depend_on_what_shares_its_batch(backend: Backend) -> None:
    """Sequences see neither each other nor what earlier steps left in the buffers."""
    bound = backend.bind_encoder(encoder_plan())
    sequences = sequences_of((20, 3, 96, 11))
    together = bound.encode(sequences).copy()
    for sequence, vector in zip(reversed(sequences), reversed(together), strict=True):
        np.testing.assert_allclose(bound.encode((sequence,))[0], vector, atol=1e-5)
    assert bound.statistics()["num_steps"] == 5
    bound.close()


def test_the_blocked_gelu_is_exact_to_rounding() -> None:
    """Against the error function of the C library, over the range that matters and far beyond."""
    values: FloatArray = np.concatenate((np.linspace(-12, 12, 100_001), [-1e30, 1e30, 0.0])).astype(np.float32)
    out = np.empty((1, len(values)), np.float32)
    with np.errstate(over="ignore"):
        bind_gelu(values[None, :], out)()
    exact = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in values.astype(np.float64)]
    np.testing.assert_allclose(out[0], exact, rtol=2e-6, atol=5e-7)


def _replace_first(plan: EncoderPlan, first: Opcode, **changes: Any) -> EncoderPlan:
    index = next(i for i, operation in enumerate(plan.program.operations) if operation.opcode is first)
    operations = list(plan.program.operations)
    operations[index] = replace(operations[index], **changes)
    return replace(plan, program=replace(plan.program, operations=tuple(operations)))


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (_replace_first(encoder_plan(), Opcode.ENCODER_ATTENTION, ints=(HEADS, 9, 0, 0, 0, 0)), "96 wide"),
        (_replace_first(encoder_plan(), Opcode.ENCODER_ATTENTION, opcode=Opcode.ATTENTION), "keeps no keys"),
        (_replace_first(encoder_plan(), Opcode.MEAN_POOL, opcode=Opcode.LAST_ROWS), "PREFILL and DECODE"),
        (_replace_first(encoder_plan(), Opcode.OUTPUT, inputs=(4, NO_VALUE)), "one row for each sequence"),
        (_replace_first(encoder_plan(), Opcode.LAYER_NORM, tensors=(0, 1, NO_TENSOR)), "LAYER_NORM"),
        (replace(encoder_plan(), context_length=CONTEXT + 1), "96 positions"),
        (replace(encoder_plan(), vector_size=WIDTH + 1), "32 wide"),
    ],
)
def test_plans_that_do_not_fit_are_refused(backend: Backend, plan: EncoderPlan, reason: str) -> None:
    """Shapes and operations of another kind of model are refused when bound, with the operation's name."""
    with pytest.raises(BackendError, match=reason):
        backend.bind_encoder(plan)


def test_generating_models_cannot_pool(backend: Backend) -> None:
    """MEAN_POOL and ENCODER_ATTENTION belong to ENCODE programs."""
    plan = encoder_plan()
    generating = ModelPlan(plan.program, plan.program, plan.tensors, 1, HEADS, WIDTH // HEADS, VOCABULARY, CONTEXT)
    with pytest.raises(BackendError, match="only in ENCODE programs"):
        backend.bind(generating)
