"""One suite for every backend: each must agree with the float32 reference, whatever the batch looks like."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_programs import TINY, random_plan

from guests.abi import NO_TENSOR, NO_VALUE, Opcode, ProgramKind
from guests.llama_assets import LlamaConfig
from guests.program import Operation, Program
from worker.backends.numkong_cpu import NumKongBackend
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import (
    Backend,
    BackendError,
    BoundModel,
    FloatArray,
    ModelPlan,
    SequenceInput,
    WeightTensor,
)
from worker.backends.thread_governor import ThreadGovernor, compute_stall_ns

BACKENDS: dict[str, Callable[[], Backend]] = {
    "numpy": NumpyBackend,
    "numkong": NumKongBackend,
    "numkong-1-thread": lambda: NumKongBackend(1),
}
CONFIGS = {
    "tiny": TINY,
    "qwen": replace(TINY, qkv_bias=True, qk_norm=True, tie_embeddings=False),
    "window": replace(TINY, sliding_window=5, sliding_window_from_layer=1),
    "wide": replace(TINY, hidden_size=64, num_heads=8, num_kv_heads=1, head_dim=16, output_bias=True),
}
#: Largest logit difference from the reference that a stored dtype may cause; logits of these models span about +-8.
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.35, "int8": 0.02}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn."""
    made: Backend = BACKENDS[request.param]()
    return made


def reference_of(plan: ModelPlan) -> BoundModel:
    """The reference backend over the same stored weights."""
    return NumpyBackend().bind(plan)


def run_tokens(bound: BoundModel, token_ids: list[int], chunks: list[int]) -> list[FloatArray]:
    """Logits after each chunk of one sequence."""
    slot = bound.open_slot(len(token_ids))
    results = []
    start = 0
    for size in chunks:
        share = tuple(token_ids[start : start + size])
        results.append(bound.step((SequenceInput(slot, start, share),))[0].copy())
        start += size
    bound.close_slot(slot)
    return results


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("config_name", CONFIGS)
def test_logits_agree_with_the_reference(backend: Backend, config_name: str, dtype: str) -> None:
    """Prefill, a second chunk and decodes of every architecture variant and stored dtype."""
    plan = random_plan(CONFIGS[config_name], dtype=dtype)
    tokens = list(np.random.default_rng(1).integers(0, TINY.vocab_size, 100))
    chunks = [37, 20, 1, 1, 41]
    expected = run_tokens(reference_of(plan), tokens, chunks)
    actual = run_tokens(backend.bind(plan), tokens, chunks)
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=TOLERANCE[dtype], rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
@pytest.mark.parametrize("name", BACKENDS)
def test_chunking_does_not_change_the_result(name: str, chunks: list[int]) -> None:
    """However a prompt is cut into steps, the logits after it are those of one step."""
    total = min(sum(chunks), TINY.context_length)
    tokens = [int(token) for token in np.random.default_rng(2).integers(0, TINY.vocab_size, total)]
    bound = BACKENDS[name]().bind(random_plan(TINY))
    sizes: list[int] = []
    for size in chunks:
        sizes.append(min(size, total - sum(sizes)))
    pieces = run_tokens(bound, tokens, [size for size in sizes if size])
    whole = run_tokens(bound, tokens, [total])
    np.testing.assert_allclose(pieces[-1], whole[-1], atol=3e-4)


@pytest.mark.parametrize("num_sequences", [2, 7, 18])
def test_batch_gives_each_sequence_its_own_logits(backend: Backend, num_sequences: int) -> None:
    """Prefills, decodes and silent chunks mixed in one step give what each sequence gets alone."""
    plan = random_plan(TINY)
    bound = backend.bind(plan)
    rng = np.random.default_rng(3)
    prompts = [list(map(int, rng.integers(0, TINY.vocab_size, 3 + 2 * i))) for i in range(num_sequences)]
    slots = [bound.open_slot(64) for _ in prompts]
    half = tuple(
        SequenceInput(slot, 0, tuple(prompt[:2]), wants_logits=False)
        for slot, prompt in zip(slots, prompts, strict=True)
    )
    assert len(bound.step(half)) == 0
    rest = tuple(
        SequenceInput(slot, 2, tuple(prompt[2:]), wants_logits=index % 3 != 1)
        for index, (slot, prompt) in enumerate(zip(slots, prompts, strict=True))
    )
    logits = bound.step(rest).copy()
    alone = [run_tokens(reference_of(plan), prompt, [len(prompt)])[0] for prompt in prompts]
    wanted = [expected for index, expected in enumerate(alone) if index % 3 != 1]
    np.testing.assert_allclose(logits, wanted, atol=3e-4)
    decodes = tuple(SequenceInput(slot, len(prompt), (5,)) for slot, prompt in zip(slots, prompts, strict=True))
    decoded = bound.step(decodes).copy()
    alone = [run_tokens(reference_of(plan), [*prompt, 5], [len(prompt), 1])[1] for prompt in prompts]
    np.testing.assert_allclose(decoded, alone, atol=3e-4)


def test_copied_prefix_continues_like_the_original(backend: Backend) -> None:
    """A slot that got a prefix by copy computes what a slot that computed it does, and leaves the source alone."""
    bound = backend.bind(random_plan(TINY))
    source, target = bound.open_slot(20), bound.open_slot(20)
    bound.step((SequenceInput(source, 0, (1, 2, 3, 4, 5)),))
    bound.copy_prefix(source, target, 4)
    other = bound.step((SequenceInput(target, 4, (9,)),))[0].copy()
    same = bound.step((SequenceInput(source, 5, (6,)),))[0].copy()
    np.testing.assert_allclose(other, run_tokens(bound, [1, 2, 3, 4, 9], [5])[0], atol=3e-4)
    np.testing.assert_allclose(same, run_tokens(bound, [1, 2, 3, 4, 5, 6], [6])[0], atol=3e-4)


def test_restored_prefix_continues_as_if_it_had_been_computed_here(backend: Backend) -> None:
    """Keys and values captured from one model fill a slot of another: what follows has the logits of a whole run."""
    plan = random_plan(TINY)
    bound, elsewhere = backend.bind(plan), backend.bind(plan)
    source = elsewhere.open_slot(20)
    elsewhere.step((SequenceInput(source, 0, (1, 2, 3, 4, 5)),))
    captured = elsewhere.capture_prefix(source, 4)
    assert captured.shape == (TINY.num_layers, 2, TINY.num_kv_heads, 4, TINY.head_dim)
    elsewhere.close()
    captured.flags.writeable = False
    for num_tokens in (4, 2):  # all of it, and its first tokens
        target = bound.open_slot(20)
        bound.restore_prefix(target, captured[:, :, :, :num_tokens])
        np.testing.assert_array_equal(bound.capture_prefix(target, num_tokens), captured[:, :, :, :num_tokens])
        tail = tuple([1, 2, 3, 4, 9, 8][num_tokens:])
        logits = bound.step((SequenceInput(target, num_tokens, tail),))[0].copy()
        np.testing.assert_allclose(logits, run_tokens(bound, [1, 2, 3, 4, 9, 8], [6])[0], atol=3e-4)


def test_prefix_that_does_not_fit_is_refused(backend: Backend) -> None:
    """More tokens than the slot holds or has room for, or another model's shape: an error, and no half-filled slot."""
    bound = backend.bind(random_plan(TINY))
    slot = bound.open_slot(20)
    with pytest.raises(BackendError, match="the slot holds 0"):
        bound.capture_prefix(slot, 1)
    shape = (TINY.num_layers, 2, TINY.num_kv_heads, 3, TINY.head_dim)
    for wrong in (shape[:4], (shape[0] + 1, *shape[1:]), (*shape[:3], 1 << 20, TINY.head_dim)):
        with pytest.raises(BackendError, match="prefix of"):
            bound.restore_prefix(slot, np.broadcast_to(np.float32(0), wrong))
    bound.restore_prefix(slot, np.zeros(shape, np.float32))


def test_reused_slot_shows_nothing_of_its_former_sequence(backend: Backend) -> None:
    """A spare slot goes to a new sequence without a trace of the old one, and slots are counted."""
    bound = backend.bind(random_plan(TINY))
    first = run_tokens(bound, [1, 2, 3], [3])[0]
    run_tokens(bound, [7] * 90, [90])
    np.testing.assert_array_equal(run_tokens(bound, [1, 2, 3], [3])[0], first)
    assert bound.statistics()["num_open_slots"] == 0
    assert bound.statistics()["kv_spare_bytes"] > 0


def test_closed_model_lets_go_of_its_weights(backend: Backend) -> None:
    """After close nothing refers to the weights any more, so that their mapping can be closed too."""
    plan = random_plan(TINY)
    watched = weakref.ref(plan.tensors[3].data)
    bound = backend.bind(plan)
    run_tokens(bound, [1, 2, 3], [3])
    bound.close()
    del plan
    assert watched() is None


def test_weights_are_read_in_place_and_never_written() -> None:
    """The fast backend binds read-only bf16 weights as they lie: no copy, no write."""
    plan = random_plan(TINY, dtype="bfloat16")
    for tensor in plan.tensors:
        tensor.data.flags.writeable = False
    run_tokens(NumKongBackend().bind(plan), [1, 2, 3], [3])


@pytest.mark.parametrize(
    ("start", "num_tokens", "message"), [(1, 1, "holds 0"), (0, 0, "0 tokens"), (0, 129, "opened for")]
)
def test_step_outside_its_slot_is_refused(backend: Backend, start: int, num_tokens: int, message: str) -> None:
    """A gap, nothing, or more than the slot holds is an error that says which."""
    bound = backend.bind(random_plan(TINY))
    slot = bound.open_slot(TINY.context_length)
    with pytest.raises(BackendError, match=message):
        bound.step((SequenceInput(slot, start, (1,) * num_tokens),))


def test_slot_beyond_the_context_is_refused(backend: Backend) -> None:
    """A slot larger than the model's context cannot be opened; closing twice is harmless."""
    bound = backend.bind(random_plan(TINY))
    with pytest.raises(BackendError, match="context is 128"):
        bound.open_slot(129)
    slot = bound.open_slot(10)
    bound.close_slot(slot)
    bound.close_slot(slot)
    with pytest.raises(BackendError, match="not open"):
        bound.step((SequenceInput(slot, 0, (1,)),))


def change_tensor(plan: ModelPlan, name: str, changed: WeightTensor) -> ModelPlan:
    """``plan`` with one weight replaced."""
    return replace(plan, tensors=tuple(changed if tensor.name == name else tensor for tensor in plan.tensors))


def test_weights_that_do_not_fit_are_refused_by_name(backend: Backend) -> None:
    """A wrong shape or dtype is an error at bind that names the tensor and what was expected."""
    plan = random_plan(TINY)
    name = "layers.0.o.weight"
    refused = {
        r"LINEAR.*has shape \(32, 31\), expected \(32, 32\)": WeightTensor(name, np.zeros((32, 31), np.float32)),
        r"layers\.0\.o\.weight: dtype float64": WeightTensor(name, np.zeros((32, 32), np.float64)),
        r"layers\.0\.o\.weight: int8 weights need": WeightTensor(name, np.zeros((32, 32), np.int8)),
    }
    for message, tensor in refused.items():
        with pytest.raises(BackendError, match=message):
            backend.bind(change_tensor(plan, name, tensor))


def test_program_without_row_selection_runs(backend: Backend) -> None:
    """The smallest program, embedding to logits without LAST_ROWS, gives the wanted rows only."""
    no_tensors, zeros = (NO_TENSOR, NO_TENSOR), (0, 0, 0, 0, 0, 0)
    operations = (
        Operation(Opcode.EMBED, 0, (NO_VALUE, NO_VALUE), (0, *no_tensors), zeros, (0.0, 0.0)),
        Operation(Opcode.LINEAR, 1, (0, NO_VALUE), (1, *no_tensors), (16, 0, 0, 0, 0, 0), (0.0, 0.0)),
        Operation(Opcode.OUTPUT, NO_VALUE, (1, NO_VALUE), (NO_TENSOR, *no_tensors), zeros, (0.0, 0.0)),
    )
    rng = np.random.default_rng(5)
    embed, head = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 8), (16, 8)))
    plan = ModelPlan(
        prefill=Program(ProgramKind.PREFILL, 2, operations),
        decode=Program(ProgramKind.DECODE, 2, operations),
        tensors=(WeightTensor("embed", embed), WeightTensor("head", head)),
        num_layers=1,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=16,
        context_length=8,
    )
    bound = backend.bind(plan)
    slots = [bound.open_slot(4), bound.open_slot(4)]
    logits = bound.step((SequenceInput(slots[0], 0, (3, 4)), SequenceInput(slots[1], 0, (5,))))
    np.testing.assert_allclose(logits, embed[[4, 5]] @ head.T, atol=1e-4)


def test_kv_bytes_are_those_of_keys_and_values(backend: Backend) -> None:
    """The budget's unit is the real size of a token: float32 keys and values of every layer."""
    config: LlamaConfig = TINY
    bound = backend.bind(random_plan(config))
    assert bound.kv_bytes_per_token == 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim


def test_governor_gives_up_threads_while_products_stall() -> None:
    """Three stalls fall back to one thread; it tries again later, less often after each failure, and recovers."""
    governor = ThreadGovernor(2)
    stall_ns = compute_stall_ns(1_000_000, 1)

    def observe(elapsed_ns: int, times: int) -> None:
        for _ in range(times):
            governor.observe(elapsed_ns, stall_ns)

    observe(stall_ns + 1, 3)
    assert (governor.num_threads, governor.num_fallbacks) == (1, 1)
    observe(stall_ns + 1, 250)
    assert governor.num_threads == 2
    observe(stall_ns + 1, 3)
    observe(stall_ns, 499)
    assert governor.num_threads == 1
    observe(stall_ns, 1 + 256)
    observe(stall_ns + 1, 2)
    observe(stall_ns, 256)
    observe(stall_ns + 1, 2)
    assert (governor.num_threads, governor.num_fallbacks) == (2, 2)
