"""The GPU backend on the emulated device: order of streams, verification in the ring, graphs, sampling, parking."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog
from cuda_device_fixtures import SETTINGS, bind, make_device, make_resources, put_in_blob
from engine_fixtures import EngineHarness, greedy, make_request
from llama_programs import TINY, compute_logits, random_plan

from loadtest.gpu_table import format_report
from scheduler.contract.states import ParkPolicy, Tier
from snapshots.errors import BlobCorrupt
from worker.backends.cuda.cuda_backend import CudaBackend
from worker.backends.cuda.cuda_model import CudaModel
from worker.backends.cuda.device import CaptureRefused, DeviceLost, OutOfDeviceMemory, Place
from worker.backends.cuda.emulated_device import EmulatedDevice, StreamOrderError
from worker.backends.cuda.weight_stream import StreamSettings, WeightStream
from worker.backends.host_sampling import sample_rows
from worker.backends.numpy_reference import NumpyBackend
from worker.backends.protocol import BackendError, FloatArray, ModelPlan, SequenceInput
from worker.backends.sampling_rows import SamplingRow
from worker.benchmarks.gpu_ladder import run_ladder
from worker.engine.mailbox import Mailbox
from worker.engine.parking import IdleParking
from worker.engine.prefixes import PrefixIndex, PrimedPrefixArray

SEEDS = range(6)
PROMPT = SequenceInput((3, 1), 0, (1, 2, 3, 4, 5, 6, 7))
PROMPT_AT_ZERO = SequenceInput((0, 1), 0, tuple(range(20)))
SETTINGS_OF_WARM_UP = StreamSettings(2, 3, 1 << 20)


def reference(plan: ModelPlan, *steps: SequenceInput) -> FloatArray:
    """The float32 reference's logits after the last of ``steps``."""
    bound = NumpyBackend().bind(plan)
    bound.open_kv(16)
    return [compute_logits(bound, step) for step in steps][-1]


# --- streams of weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_prefill_beside_arriving_weights_is_right_in_any_order(seed: int) -> None:
    """However the device orders its streams, a prefill that begins at once gives the reference's logits."""
    plan = put_in_blob(random_plan(TINY))
    model = bind(plan, make_device(seed))
    np.testing.assert_allclose(compute_logits(model, PROMPT), reference(plan, PROMPT), atol=3e-4)
    model.close()


def run_all_seeds(plan: ModelPlan) -> list[bool]:
    """For each seed, whether the result was right; the device's own complaints count as wrong."""
    expected = reference(plan, PROMPT)
    right = []
    for seed in SEEDS:
        try:
            logits = compute_logits(bind(plan, make_device(seed)), PROMPT)
            right.append(bool(np.allclose(logits, expected, atol=3e-4)))
        except (StreamOrderError, BackendError):
            right.append(False)
    return right


def test_missing_wait_for_weights_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compute stream's waits the emulated device computes with what has not arrived."""
    plan = put_in_blob(random_plan(TINY))
    assert all(run_all_seeds(plan))
    wait = WeightStream.wait_for

    def forget(stream: WeightStream, last_piece: int, compute: Any) -> None:
        wait(stream, last_piece, stream._stream)  # the copy's own stream: nobody is held up

    monkeypatch.setattr(WeightStream, "wait_for", forget)
    assert not all(run_all_seeds(plan))


def test_missing_wait_for_a_slot_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring slot that is filled again before its copy ran is an error of the device, not a wrong weight."""
    plan = put_in_blob(random_plan(TINY))

    def reuse(stream: WeightStream, index: int) -> Any:
        return stream._ring.slots[index % len(stream._ring.slots)]

    monkeypatch.setattr(WeightStream, "_claim_slot", reuse)
    assert not all(run_all_seeds(plan))


def test_missing_wait_for_a_step_buffer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of a step that are overwritten by the next one's before their copy ran are noticed."""
    plan = random_plan(TINY)
    model = bind(plan, make_device(1))
    monkeypatch.setattr(model._device, "synchronise", lambda event: None)
    with pytest.raises(StreamOrderError, match="pinned memory changed"):
        run_decodes_unsynchronised(model, monkeypatch)


def run_decodes_unsynchronised(model: CudaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight decodes whose buffers nobody waits for, then the wait that runs them."""
    for token in range(8):
        model.step((replace(PROMPT, start=token, token_ids=(token,), num_logits=0),))
    monkeypatch.undo()
    model.logits()


@pytest.mark.parametrize("chunk", [0, 3, -1])
def test_chunk_that_is_not_signed_is_never_copied(chunk: int) -> None:
    """A changed byte anywhere: the step ends with an error that says where, and the bytes are not on the device."""
    plan = put_in_blob(random_plan(TINY))
    assert plan.blob is not None
    place = (chunk % (plan.blob.data.nbytes // 4096)) * 4096 + 17
    plan.blob.data[place] ^= 1
    model = bind(plan, make_device(2))
    with pytest.raises(BlobCorrupt, match="not what was signed"):
        model.wait_weights()
    with pytest.raises(BlobCorrupt):
        model.step((SequenceInput((0,), 0, (1,)),))
    assert model._image is not None
    on_device = model._image.memory.bytes[place // 4096 * 4096 : place + 1]  # type: ignore[attr-defined]
    assert (on_device == 0xFF).all()


def test_verification_can_be_left_out_to_measure_it() -> None:
    """With verification off nothing is compared: what gpu-check subtracts."""
    plan = put_in_blob(random_plan(TINY))
    assert plan.blob is not None
    plan.blob.data[-1] ^= 1
    device = make_device()
    resources = make_resources(device, replace(SETTINGS, verifies=False))
    model = CudaModel(plan, resources)
    model.wait_weights()


def test_weights_still_being_verified_by_the_agent_are_waited_for() -> None:
    """A piece is read after its ``wait_verified`` has returned, and only as far as it is needed."""
    plan = put_in_blob(random_plan(TINY))
    assert plan.blob is not None
    waited: list[int] = []
    content = plan.blob.data.copy()
    plan.blob.data[:] = 0xAA

    def arrive(end: int) -> None:
        waited.append(end)
        plan.blob.data[:end] = content[:end]

    plan = replace(plan, blob=replace(plan.blob, wait_verified=arrive))
    model = bind(plan, make_device())
    model.wait_weights()
    assert waited
    np.testing.assert_allclose(compute_logits(model, PROMPT), reference(plan, PROMPT), atol=3e-4)


def test_pieces_too_large_for_the_ring_are_refused() -> None:
    """A snapshot with larger chunks than the ring's slots is refused when it is bound."""
    with pytest.raises(BackendError, match="slots have 4096"):
        bind(put_in_blob(random_plan(TINY), 8192), make_device())


# --- steps ------------------------------------------------------------------------------------------------------------


def test_graphs_and_single_commands_give_the_same_bits() -> None:
    """Decodes of several batch sizes replay graphs; their logits are those of the same commands, bit for bit."""
    plan = random_plan(replace(TINY, head_dim=64, num_heads=2, num_kv_heads=1), dtype="bfloat16")
    device = make_device()
    models = [bind(plan, device, uses_graphs=uses) for uses in (True, False)]
    steps = [tuple(SequenceInput((i,), t, (5 + i,)) for i in range(n)) for t, n in enumerate((1, 3, 3, 2, 1))]
    for model in models:
        model.wait_weights()
    for step in steps:
        graphed, plain = (compute_logits(model, *step) for model in models)
        np.testing.assert_array_equal(graphed, plain)
    found = models[0].statistics()
    assert found["num_graph_replays"] == len(steps)
    assert found["num_graphs"] == 3  # buckets 1, 2 and 4
    assert models[1].statistics()["num_graph_replays"] == 0


def test_refused_capture_leaves_single_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that makes no graph of a step still serves it, and is not asked again for that shape."""
    device, asked = make_device(), []

    def refuse(_stream: object, _enqueue: object) -> None:
        asked.append(1)
        raise CaptureRefused("no")

    monkeypatch.setattr(device, "capture", refuse)
    plan = random_plan(TINY)
    model, reference = bind(plan, device), NumpyBackend().bind(plan)
    reference.open_kv(16)
    for one in (model, reference):
        one.step((PROMPT_AT_ZERO,))
    model.wait_weights()
    for position in (20, 21):
        step = SequenceInput((0, 1), position, (1,))
        np.testing.assert_allclose(compute_logits(model, step), compute_logits(reference, step), atol=1e-3, rtol=0)
    assert asked == [1]
    model.close()


def test_padding_of_a_bucket_writes_to_no_block() -> None:
    """Three decodes in a bucket of four leave block 0, which none of them has, as it was."""
    model = bind(random_plan(TINY), make_device())
    model.step(tuple(SequenceInput((i,), 0, (i,)) for i in (1, 2, 3)))
    assert not model.capture_prefix((0,), 16).any()


def test_growing_steps_drop_graphs_that_hold_old_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that makes the workspace move is followed by decodes with fresh graphs."""
    monkeypatch.setattr("worker.backends.cuda.workspace._SMALL_BYTES", 256)
    plan = random_plan(TINY)
    model = bind(plan, make_device())
    model.wait_weights()
    compute_logits(model, SequenceInput((0,), 0, (1,)))
    model.step((SequenceInput((1, 2, 3), 0, tuple(range(40))),))
    assert model.statistics()["num_graphs"] == 0
    logits = compute_logits(model, SequenceInput((0,), 1, (2,)))
    np.testing.assert_allclose(
        logits, reference(plan, SequenceInput((0,), 0, (1,)), SequenceInput((0,), 1, (2,))), atol=3e-4
    )


def test_quantised_products_in_pieces_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A widened matrix that is larger than its area is multiplied piece by piece."""
    monkeypatch.setattr("worker.backends.cuda.linear_commands.WIDENED_BYTES", 1000)
    plan = random_plan(TINY, dtype="int8")
    prompt = replace(PROMPT, token_ids=tuple(range(12)))
    model = bind(plan, make_device())
    np.testing.assert_allclose(compute_logits(model, prompt), reference(plan, prompt), atol=0.02)


# --- sampling ---------------------------------------------------------------------------------------------------------

ROWS = [
    SamplingRow(0),
    SamplingRow(1, uniform=0.3, temperature=0.8),
    SamplingRow(1, uniform=0.9, temperature=1.3, top_k=7),
    SamplingRow(2, repetition_penalty=1.4, seen_ids=np.array([1, 5, 90])),
    SamplingRow(0, presence_penalty=0.5, frequency_penalty=0.2, counted_ids=np.array([3]), counts=np.float32([2])),
    SamplingRow(2, bias_ids=np.array([11]), bias_values=np.float32([50])),
    SamplingRow(1, allowed=np.array([0b1000, 0, 0], np.uint32), num_top_logprobs=3),
    SamplingRow(0, num_top_logprobs=0),
]


@pytest.mark.parametrize("chosen", [ROWS, ROWS[:1], ROWS[1:3], ROWS[6:]])
def test_tokens_and_logprobs_are_those_of_the_host(chosen: list[SamplingRow]) -> None:
    """The device draws what the host's rule draws from the same logits, and reports the same log-probabilities."""
    model = bind(random_plan(TINY), make_device())
    logits = compute_logits(model, replace(PROMPT, num_logits=3))
    wanted = sample_rows(logits, chosen)
    found = model.sample(chosen)
    assert [token.token_id for token in found] == [token.token_id for token in wanted]
    for got, want in zip(found, wanted, strict=True):
        assert (got.logprobs is None) == (want.logprobs is None)
        if got.logprobs is not None and want.logprobs is not None:
            assert got.logprobs.chosen == pytest.approx(want.logprobs.chosen, abs=1e-5)
            assert [i for i, _ in got.logprobs.top] == [i for i, _ in want.logprobs.top]


# --- parking and faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_kv", [True, False])
def test_parked_model_gives_its_memory_back_and_goes_on(keeps_kv: bool) -> None:
    """Parked, a model holds no weights on the device; unparked, it brings them from locked memory, verified."""
    plan = put_in_blob(random_plan(TINY))
    device = make_device(4)
    model = bind(plan, device)
    model.step((PROMPT,))
    used_bytes = device.capacity_bytes - device.read_memory().free_bytes
    model.park(keeps_kv=keeps_kv)
    model.park()
    left_bytes = device.capacity_bytes - device.read_memory().free_bytes
    assert left_bytes == (16 * model.kv_block_bytes if keeps_kv else 0) < used_bytes
    with pytest.raises(BackendError):
        model.step((PROMPT,))
    model.unpark()
    more = SequenceInput(PROMPT.block_table, 7, (9,))
    if not keeps_kv:
        model.step((PROMPT,))
    np.testing.assert_allclose(compute_logits(model, more), reference(plan, PROMPT, more), atol=3e-4)
    model.close()


@pytest.mark.parametrize("locks_source", [True, False])
def test_parked_weights_are_verified_again(locks_source: bool) -> None:
    """Memory that changed while a model was parked is noticed before it is computed with, by either way back."""
    plan = put_in_blob(random_plan(TINY))
    assert plan.blob is not None
    model = bind(plan, make_device())
    model.park(locks_source=locks_source)
    plan.blob.data[100] ^= 4
    model.unpark()
    with pytest.raises(BlobCorrupt):
        model.step((PROMPT,))


def test_full_device_refuses_and_goes_on() -> None:
    """Blocks that do not fit are an error; what was there before still works."""
    plan = put_in_blob(random_plan(TINY))
    device = make_device(capacity_bytes=700_000)
    model = bind(plan, device)
    expected = compute_logits(model, PROMPT)
    with pytest.raises(OutOfDeviceMemory, match="are free"):
        bind(plan, device, num_blocks=100_000)
    np.testing.assert_array_equal(compute_logits(model, PROMPT), expected)


def test_unparking_without_room_leaves_the_model_parked() -> None:
    """Somebody else took the memory: an error, and a later attempt succeeds."""
    device = make_device(capacity_bytes=700_000)
    model = bind(put_in_blob(random_plan(TINY)), device)
    model.park()
    taken: Place = device.allocate(device.read_memory().free_bytes // 256 * 256)
    with pytest.raises(OutOfDeviceMemory):
        model.unpark()
    assert model.is_parked
    device.free(taken)
    model.unpark()
    assert not model.is_parked


def test_sticky_error_ends_everything() -> None:
    """After an error that CUDA keeps, each call says so: the worker ends and is started anew."""
    device: EmulatedDevice = make_device()
    model = bind(random_plan(TINY), device)
    device.lose_after = device.num_launches + 3
    for _ in range(2):
        with pytest.raises(DeviceLost):
            model.step((PROMPT,))


# --- under the engine -------------------------------------------------------------------------------------------------


def test_engine_on_the_gpu_backend_gives_the_reference_tokens() -> None:
    """Several requests at once through the real engine, weights still arriving at the first step: the same greedy
    tokens as on NumPy, and a shared prefix is computed once."""
    plan = put_in_blob(random_plan(TINY))
    prompts = [tuple(range(4, 40)), (5, 6, 7), (*range(4, 36), 50, 51)]
    texts = []
    for bound in (CudaModel(plan, make_resources(make_device(5))), NumpyBackend().bind(plan)):
        harness = EngineHarness(plan=plan, bound=bound, kv_budget_bytes=1 << 19)
        outcomes = [
            harness.submit(make_request(f"r{i}", prompt, greedy(12, ignore_eos=True)))
            for i, prompt in enumerate(prompts)
        ]
        harness.run_until_done()
        texts.append([outcome.token_ids() for outcome in outcomes])
    assert texts[0] == texts[1]


def test_idle_engine_parks_the_model_and_serves_again() -> None:
    """Through the engine's own waiting: parked after the idle time, back for the next request, same tokens."""
    plan = put_in_blob(random_plan(TINY))
    model = CudaModel(plan, make_resources(make_device(6)))
    harness = EngineHarness(plan=plan, bound=model, kv_budget_bytes=1 << 19)
    first = harness.complete(make_request("r1", (4, 5, 6), greedy(6, ignore_eos=True)))
    mailbox = Mailbox()
    request = make_request("r2", (4, 5, 6), greedy(6, ignore_eos=True))
    parking = IdleParking(model, 0.01, lambda tier: mailbox.submit(request) if tier is Tier.PARKED else None)
    parking.wait_collect(mailbox)
    second = harness.complete(request)
    assert second.token_ids() == first.token_ids()


PREFIX = tuple(range(4, 40))


@pytest.mark.parametrize("policy", [ParkPolicy.KEEP, ParkPolicy.DROP])
def test_after_a_parking_prefixes_are_taken_over_where_they_were_kept_and_else_computed_anew(
    policy: ParkPolicy,
) -> None:
    """The same tokens either way; dropped, the device holds nothing of the model, and the blocks' books forget.

    A primed prefix comes back from its mapping, not by computing.
    """
    plan = put_in_blob(random_plan(TINY))
    device = make_device(7)
    reference_model = NumpyBackend().bind(plan)
    reference_model.open_kv(3)
    primed_ids = PREFIX[:20]
    reference_model.step((SequenceInput((0, 1, 2), 0, primed_ids),))
    primed = PrefixIndex([PrimedPrefixArray(primed_ids, reference_model.capture_prefix((0, 1, 2), len(primed_ids)))])
    model = CudaModel(plan, make_resources(device))
    harness = EngineHarness(plan=plan, bound=model, kv_budget_bytes=1 << 19, prefixes=primed)
    mailbox = Mailbox()
    request = make_request("again", (*PREFIX, 50, 51), greedy(8, ignore_eos=True))
    heard: list[Tier] = []

    def on_moved(tier: Tier) -> None:
        heard.append(tier)
        if tier is Tier.PARKED:
            mailbox.submit(request)

    parking = IdleParking(model, 0.01, on_moved, policy)

    def complete(name: str) -> tuple[list[int], int]:
        outcome = harness.complete(make_request(name, (*PREFIX, 50, 51), greedy(8, ignore_eos=True)))
        assert outcome.final is not None
        return outcome.token_ids(), outcome.final.usage.cached_tokens

    first, num_primed = complete("r1")
    assert (complete("r2"), num_primed) == ((first, 32), 20)
    hot_bytes = device.capacity_bytes - device.read_memory().free_bytes
    with structlog.testing.capture_logs() as logs:
        parking.wait_collect(mailbox)
    kv_bytes = model.statistics()["kv_resident_bytes"]
    left_bytes = kv_bytes if policy is ParkPolicy.KEEP else 0
    told = next(line for line in logs if line["event"] == "model_parked")
    assert told["freed_bytes"] == hot_bytes - left_bytes
    assert told["device_free_bytes"] == device.capacity_bytes - left_bytes
    assert heard == [Tier.PARKED, Tier.HOT]
    assert complete("r3") == (first, 32 if policy is ParkPolicy.KEEP else num_primed)
    assert complete("r4") == (first, 32)


def test_lost_device_ends_the_engine_and_full_memory_only_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sticky error leaves the engine, so that the worker is replaced; memory that is missing fails its requests."""
    monkeypatch.setattr("worker.backends.cuda.workspace._SMALL_BYTES", 256)
    device = make_device()
    harness = EngineHarness(bound=CudaModel(random_plan(TINY), make_resources(device)), kv_budget_bytes=1 << 18)
    harness.complete(make_request("r1", (1, 2, 3), greedy(2)))
    device.capacity_bytes = 0
    large = harness.complete(make_request("r2", tuple(range(4, 90)), greedy(2)))
    assert large.final.error is not None
    assert "are free" in large.final.error.message
    device.capacity_bytes = 1 << 30
    assert harness.complete(make_request("r3", (1, 2, 3), greedy(2))).final.error is None
    device.lose_after = device.num_launches
    with pytest.raises(DeviceLost):
        harness.complete(make_request("r4", (1, 2, 3), greedy(2)))


# --- warm-up and measurement ------------------------------------------------------------------------------------------


def test_warm_worker_has_launched_the_kernels_of_its_models() -> None:
    """All that a bf16 or int8 decoder launches in its first request ran once, tiny, when the worker warmed up."""
    device = make_device()
    launched: set[str] = set()
    run = device._run_kernel
    device._run_kernel = lambda launch: (launched.add(launch.kernel), run(launch))[1]
    backend = CudaBackend(lambda: device, SETTINGS_OF_WARM_UP)
    backend.warm()
    backend.warm()
    warmed = set(launched)
    launched.clear()
    for dtype in ("bfloat16", "int8"):
        shape = replace(TINY, head_dim=64, num_heads=2, num_kv_heads=2)
        model = backend.bind(random_plan(shape, dtype=dtype))
        model.open_kv(4)
        model.step((PROMPT_AT_ZERO,))
        model.step((SequenceInput((0, 1), 20, (1,)),))
        model.sample([SamplingRow(0), SamplingRow(0, 0.3, 0.8, top_p=0.9)])
    assert launched <= warmed


def test_ladder_measures_every_tier_of_a_tiny_model() -> None:
    """The measurement of gpu-check runs from end to end on the emulated device, and its table has a line a model."""
    figures = run_ladder(make_device(), [("tiny", "bf16")], 1, sweeps=False, probe_bytes=1 << 16, num_steps=2)
    model = figures["models"]["tiny-bf16"]
    assert model["t3_ms"]["median"] > 0
    assert model["decode_ms"].keys() == {"1"}
    assert any(line.startswith("tiny-bf16") for line in format_report({"ladder-tiny-bf16": figures}))
