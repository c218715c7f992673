"""One suite for every backend: each must agree with the float32 reference, whatever the batch looks like."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import gguf
import numpy as np
import pytest
from cuda_device_fixtures import emulated_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_programs import TINY, compute_logits, random_plan

from guests.abi import NO_TENSOR, NO_VALUE, Opcode, ProgramKind
from guests.llama_assets import LlamaConfig
from guests.program import Operation, Program
from snapshots.block_types import BLOCK_TYPES
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
    "cuda": emulated_backend,
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


@pytest.fixture(params=["numpy", "numkong"])
def host_backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend that keeps its blocks in pages of host memory."""
    return BACKENDS[request.param]()


def reference_of(plan: ModelPlan) -> BoundModel:
    """The reference backend over the same stored weights."""
    return bind(NumpyBackend(), plan)


NUM_BLOCKS = 256
#: Block tables that no test hands out: for a sequence beside those of the test.
SPARE_BLOCKS = tuple(range(NUM_BLOCKS - 16, NUM_BLOCKS))


def bind(backend: Backend, plan: ModelPlan) -> BoundModel:
    """``plan`` bound, with KV blocks."""
    bound = backend.bind(plan)
    bound.open_kv(NUM_BLOCKS)
    return bound


def run_tokens(
    bound: BoundModel, token_ids: list[int], chunks: list[int], block_table: tuple[int, ...] = SPARE_BLOCKS
) -> list[FloatArray]:
    """Logits after each chunk of one sequence."""
    results = []
    start = 0
    for size in chunks:
        share = tuple(token_ids[start : start + size])
        results.append(compute_logits(bound, SequenceInput(block_table, start, share))[0])
        start += size
    bound.release_blocks(block_table)
    return results


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("config_name", CONFIGS)
def test_logits_agree_with_the_reference(backend: Backend, config_name: str, dtype: str) -> None:
    """Prefill, a second chunk and decodes of every architecture variant and stored dtype."""
    plan = random_plan(CONFIGS[config_name], dtype=dtype)
    tokens = list(np.random.default_rng(1).integers(0, TINY.vocab_size, 100))
    chunks = [37, 20, 1, 1, 41]
    expected = run_tokens(reference_of(plan), tokens, chunks)
    actual = run_tokens(bind(backend, plan), tokens, chunks)
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=TOLERANCE[dtype], rtol=0)


GPU_FORMATS = {"fp8": 0.02, "int4": 0.02, "gguf": 0.02}
#: Widths that int4's groups of 32 fit into.
GROUPED = replace(TINY, hidden_size=64, intermediate_size=96, tie_embeddings=False)
#: Widths that every type of GGUF's blocks fits into, and one for those of 32.
BLOCKY = replace(TINY, hidden_size=256, intermediate_size=256, tie_embeddings=False)


@pytest.mark.parametrize("dtype", GPU_FORMATS)
def test_formats_of_gpus_agree_with_their_values(dtype: str) -> None:
    """fp8, int4 and blocks are computed by the reference and on the device as what they stand for, said in two ways."""
    plan = random_plan(BLOCKY if dtype == "gguf" else GROUPED, dtype=dtype)
    if dtype == "gguf":
        assert {tensor.block_type for tensor in plan.tensors} == {"", *BLOCK_TYPES}
    tokens, chunks = list(range(60)), [37, 20, 1, 1, 1]
    plain = replace(plan, tensors=tuple(map(widen, plan.tensors)))
    expected = run_tokens(reference_of(plain), tokens, chunks)
    for backend in (NumpyBackend(), emulated_backend()):
        for got, want in zip(run_tokens(bind(backend, plan), tokens, chunks), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=GPU_FORMATS[dtype], rtol=0)
    with pytest.raises(BackendError, match=rf"({'Q' if dtype == 'gguf' else dtype}).*--quantize int8"):
        NumKongBackend().bind(plan)


def widen(tensor: WeightTensor) -> WeightTensor:
    """``tensor`` as float32: element by element, blocks by the package that defines them."""
    if tensor.block_type:
        values = gguf.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.block_type])
        return WeightTensor(tensor.name, values.reshape(tensor.shape))
    if tensor.scale is None:
        return tensor
    values = np.empty(tensor.shape, np.float32)
    for row, column in np.ndindex(*tensor.shape):
        if tensor.is_int4:
            code = int(tensor.data[row, column // 2]) >> 4 * (column % 2) & 15
            values[row, column] = (code - 8) * float(tensor.scale[row, column // 32])
        else:
            values[row, column] = float(tensor.data[row, column]) * float(tensor.scale[row])
    return WeightTensor(tensor.name, values)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
@pytest.mark.parametrize("name", BACKENDS)
def test_chunking_does_not_change_the_result(name: str, chunks: list[int]) -> None:
    """However a prompt is cut into steps, the logits after it are those of one step."""
    total = min(sum(chunks), TINY.context_length)
    tokens = [int(token) for token in np.random.default_rng(2).integers(0, TINY.vocab_size, total)]
    bound = bind(BACKENDS[name](), random_plan(TINY))
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
    bound = bind(backend, plan)
    rng = np.random.default_rng(3)
    prompts = [list(map(int, rng.integers(0, TINY.vocab_size, 3 + 2 * i))) for i in range(num_sequences)]
    tables = [(4 * i, 4 * i + 2, 4 * i + 1, 4 * i + 3) for i in range(num_sequences)]  # two runs meet in a sequence
    half = tuple(
        SequenceInput(table, 0, tuple(prompt[:2]), num_logits=0) for table, prompt in zip(tables, prompts, strict=True)
    )
    assert len(compute_logits(bound, *half)) == 0
    rest = tuple(
        SequenceInput(table, 2, tuple(prompt[2:]), num_logits=int(index % 3 != 1))
        for index, (table, prompt) in enumerate(zip(tables, prompts, strict=True))
    )
    logits = compute_logits(bound, *rest)
    alone = [run_tokens(reference_of(plan), prompt, [len(prompt)])[0] for prompt in prompts]
    wanted = [expected for index, expected in enumerate(alone) if index % 3 != 1]
    np.testing.assert_allclose(logits, wanted, atol=3e-4)
    decodes = tuple(SequenceInput(table, len(prompt), (5,)) for table, prompt in zip(tables, prompts, strict=True))
    decoded = compute_logits(bound, *decodes)
    alone = [run_tokens(reference_of(plan), [*prompt, 5], [len(prompt), 1])[1] for prompt in prompts]
    np.testing.assert_allclose(decoded, alone, atol=3e-4)


@pytest.mark.parametrize("config_name", ["tiny", "window"])
def test_scattered_blocks_compute_what_neighbouring_ones_do(backend: Backend, config_name: str) -> None:
    """Whatever blocks a sequence has, in one run or in many, its logits are the same in prefill and decode."""
    bound = bind(backend, random_plan(CONFIGS[config_name]))
    tokens = list(map(int, np.random.default_rng(4).integers(0, TINY.vocab_size, 100)))
    chunks = [37, 20, 1, 1, 20, 21]
    expected = run_tokens(bound, tokens, chunks)
    for table in ((9, 3, 4, 5, 1, 0, 7), (8, 6, 4, 2, 0, 1, 3), (0, 1, 2, 5, 6, 7, 8)):
        for found, wanted in zip(run_tokens(bound, tokens, chunks, table), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=3e-4)


def test_logits_of_the_last_tokens_are_those_of_single_steps(backend: Backend) -> None:
    """A step that wants the logits of several tokens gives what one step a token gives, beside another sequence."""
    bound = bind(backend, random_plan(TINY))
    tokens = [1, 2, 3, 4, 5, 6, 7]
    expected = run_tokens(bound, tokens, [4, 1, 1, 1])[1:] + run_tokens(bound, [8, 9], [2])
    inputs = (SequenceInput((0,), 0, tuple(tokens), num_logits=3), SequenceInput((1,), 0, (8, 9)))
    np.testing.assert_allclose(compute_logits(bound, *inputs), expected, atol=3e-4)


def test_copied_block_continues_like_the_original(backend: Backend) -> None:
    """A block that got its tokens by copy leads to the logits of the original, which it leaves alone."""
    bound = bind(backend, random_plan(TINY))
    source, target = (0,), (5,)
    bound.step((SequenceInput(source, 0, (1, 2, 3, 4, 5)),))
    bound.copy_blocks([(0, 5)])
    other = compute_logits(bound, SequenceInput(target, 4, (9,)))[0]
    same = compute_logits(bound, SequenceInput(source, 5, (6,)))[0]
    np.testing.assert_allclose(other, run_tokens(bound, [1, 2, 3, 4, 9], [5])[0], atol=3e-4)
    np.testing.assert_allclose(same, run_tokens(bound, [1, 2, 3, 4, 5, 6], [6])[0], atol=3e-4)


def test_restored_prefix_continues_as_if_it_had_been_computed_here(backend: Backend) -> None:
    """Keys and values captured from one model fill blocks of another: what follows has the logits of a whole run."""
    plan = random_plan(TINY)
    bound, elsewhere = bind(backend, plan), bind(backend, plan)
    source = (3, 4)
    elsewhere.step((SequenceInput(source, 0, (1, 2, 3, 4, 5)),))
    captured = elsewhere.capture_prefix(source, 4)
    assert captured.shape == (TINY.num_layers, 2, TINY.num_kv_heads, 4, TINY.head_dim)
    elsewhere.close()
    captured.flags.writeable = False
    for num_tokens in (4, 2):  # all of it, and its first tokens
        target = (7, 2)
        bound.restore_prefix(target, captured[:, :, :, :num_tokens])
        np.testing.assert_array_equal(bound.capture_prefix(target, num_tokens), captured[:, :, :, :num_tokens])
        tail = tuple([1, 2, 3, 4, 9, 8][num_tokens:])
        logits = compute_logits(bound, SequenceInput(target, num_tokens, tail))[0]
        np.testing.assert_allclose(logits, run_tokens(bound, [1, 2, 3, 4, 9, 8], [6])[0], atol=3e-4)


def test_prefix_that_does_not_fit_is_refused(backend: Backend) -> None:
    """More tokens than the table has room for, or another model's shape: an error, and nothing is written."""
    bound = bind(backend, random_plan(TINY))
    slot = (0, 1)
    with pytest.raises(BackendError, match="33 tokens in blocks for 32"):
        bound.capture_prefix(slot, 33)
    shape = (TINY.num_layers, 2, TINY.num_kv_heads, 3, TINY.head_dim)
    for wrong in (shape[:4], (shape[0] + 1, *shape[1:]), (*shape[:3], 1 << 20, TINY.head_dim)):
        with pytest.raises(BackendError, match=r"prefix of|tokens in blocks"):
            bound.restore_prefix(slot, np.broadcast_to(np.float32(0), wrong))
    assert not bound.capture_prefix(slot, 32).any()
    bound.restore_prefix(slot, np.ones(shape, np.float32))


def test_reused_block_shows_nothing_of_its_former_sequence(backend: Backend) -> None:
    """A released block goes to a new sequence without a trace of the old one."""
    bound = bind(backend, random_plan(TINY))
    first = run_tokens(bound, [1, 2, 3], [3])[0]
    run_tokens(bound, [7] * 90, [90])
    np.testing.assert_array_equal(run_tokens(bound, [1, 2, 3], [3])[0], first)


def test_spare_memory_of_released_blocks_is_counted(host_backend: Backend) -> None:
    """Blocks that a sequence has left are counted as spare."""
    bound = bind(host_backend, random_plan(TINY))
    run_tokens(bound, [7] * 90, [90])
    assert bound.statistics()["kv_spare_bytes"] == len(SPARE_BLOCKS) * bound.kv_block_bytes


def test_memory_of_released_blocks_goes_back_beyond_the_spare_limit(
    host_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the limit whole pages of released blocks are empty again; blocks in use keep what they hold."""
    monkeypatch.setattr("worker.backends.kv_blocks.MAX_SPARE_BYTES", 0)
    bound = bind(host_backend, random_plan(replace(TINY, head_dim=64)))
    run_tokens(bound, [1] * 40, [40], (0, 1, 2))
    kept = run_tokens(bound, [1, 2, 3], [3], (0,))
    bound.step((SequenceInput((0, 1), 0, (1,) * 20),))
    assert bound.statistics()["kv_resident_bytes"] == 2 * bound.kv_block_bytes
    bound.release_blocks((1,))
    assert bound.statistics()["kv_resident_bytes"] == bound.kv_block_bytes
    assert not bound.capture_prefix((1,), 16).any()
    assert bound.capture_prefix((0,), 16).all()
    np.testing.assert_array_equal(run_tokens(bound, [1, 2, 3], [3], (1,)), kept)


def test_small_portions_of_a_long_prompt(host_backend: Backend) -> None:
    """Portion by portion beyond 512 tokens, two prompts in turn, another one's decode between: as the reference. What a
    backend keeps for a prompt goes with the prompt."""
    config = replace(TINY, context_length=1024)
    plan = random_plan(config, dtype="bfloat16")
    rng = np.random.default_rng(3)
    prompts = [[int(token) for token in rng.integers(0, TINY.vocab_size, 700)] for _ in range(2)]
    tables = [tuple(range(44)), tuple(range(50, 94))]
    reference, bound = reference_of(plan), bind(host_backend, plan)
    for model in (reference, bound):
        model.step(tuple(SequenceInput(table, 0, tuple(ids[:500])) for table, ids in zip(tables, prompts, strict=True)))
    for start in range(500, 700, 40):
        for table, ids in zip(tables, prompts, strict=True):
            portion = SequenceInput(table, start, tuple(ids[start : start + 40]))
            other = SequenceInput(SPARE_BLOCKS, 0, (5,))
            got, want = (compute_logits(model, other, portion) for model in (bound, reference))
            np.testing.assert_allclose(got, want, atol=TOLERANCE["bfloat16"], rtol=0)
    for table, ids in zip(tables, prompts, strict=True):
        decode = SequenceInput(table, 700, (ids[0],))
        got, want = (compute_logits(model, decode) for model in (bound, reference))
        np.testing.assert_allclose(got, want, atol=TOLERANCE["bfloat16"], rtol=0)
        bound.release_blocks(table)
    assert bound.statistics().get("kv_packed_bytes", 0) == 0


def test_closed_model_lets_go_of_its_weights(backend: Backend) -> None:
    """After close nothing refers to the weights any more, so that their mapping can be closed too."""
    plan = random_plan(TINY)
    watched = weakref.ref(plan.tensors[3].data)
    bound = bind(backend, plan)
    run_tokens(bound, [1, 2, 3], [3])
    bound.close()
    del plan
    assert watched() is None


def test_weights_are_read_in_place_and_never_written() -> None:
    """The fast backend binds read-only bf16 weights as they lie: no copy, no write."""
    plan = random_plan(TINY, dtype="bfloat16")
    for tensor in plan.tensors:
        tensor.data.flags.writeable = False
    run_tokens(bind(NumKongBackend(), plan), [1, 2, 3], [3])


@pytest.mark.parametrize(
    ("block_table", "start", "num_tokens", "message"),
    [
        ((0, 1), 0, 0, "0 tokens"),
        ((0, 1), -1, 2, "position -1"),
        ((0, 1), 16, 17, "33 tokens in blocks for 32"),
        ((), 0, 1, "1 tokens in blocks for 0"),
        (tuple(range(9)), 0, 129, "context is 128"),
        ((NUM_BLOCKS,), 0, 1, "KV block 256: there are 256"),
        ((-1,), 0, 1, "KV block -1"),
    ],
)
def test_step_outside_its_blocks_is_refused(
    backend: Backend, block_table: tuple[int, ...], start: int, num_tokens: int, message: str
) -> None:
    """Nothing to compute, too few blocks, blocks that do not exist, or beyond the context: an error that says which."""
    bound = bind(backend, random_plan(TINY))
    with pytest.raises(BackendError, match=message):
        bound.step((SequenceInput(block_table, start, (1,) * num_tokens),))


def test_kv_memory_is_opened_once_and_closed_for_good(backend: Backend) -> None:
    """A second opening is an error; closing twice is harmless, and no step runs without blocks."""
    bound = bind(backend, random_plan(TINY))
    with pytest.raises(BackendError, match="open already"):
        bound.open_kv(1)
    bound.close()
    bound.close()
    with pytest.raises(BackendError, match="there are 0"):
        bound.step((SequenceInput((0,), 0, (1,)),))


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
    bound = bind(backend, plan)
    logits = compute_logits(bound, SequenceInput((0,), 0, (3, 4)), SequenceInput((1,), 0, (5,)))
    np.testing.assert_allclose(logits, embed[[4, 5]] @ head.T, atol=1e-4)


def test_kv_bytes_are_those_of_keys_and_values(backend: Backend) -> None:
    """The budget's unit is the real size of 16 tokens: float32 keys and values of every layer."""
    config: LlamaConfig = TINY
    bound = backend.bind(random_plan(config))
    assert bound.kv_block_bytes == 16 * 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim


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
