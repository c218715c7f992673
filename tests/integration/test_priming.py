"""Primed prefixes from the build to the answer: what is chosen, what is stored, and that answers stay the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from engine_fixtures import Outcome, greedy, make_request
from llama_programs import compute_logits

from guests.runtime import GuestEngine
from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.messages import ModelCard
from snapshots.errors import BlobCorrupt, ManifestMalformed, MappingError
from snapshots.manifest import PRIMED_PREFIXES, Manifest, validate_manifest
from snapshots.mapping import seal_blob
from tests.checkpoint_files import DATA
from tests.model_fixtures import SMOLLM2, BuiltState, new_state
from tests.snapshot_fixtures import flip_byte
from worker.backends.choice import make_backend
from worker.backends.protocol import FloatArray, SequenceInput
from worker.build.errors import BuildError
from worker.build.hf_source import open_hugging_face
from worker.build.priming import Priming, share_beginning
from worker.build.snapshot_builder import build_snapshot
from worker.build.weights_reuse import build_over_weights
from worker.engine.engine import Engine
from worker.engine.mailbox import Mail
from worker.engine.types import RequestStep
from worker.loaded_model import LoadedModel
from worker.restore import RestoredModel, restore_model

SYSTEM = "You are a careful tester."
OTHER_SYSTEM = "You are a patient teacher."
TEXT = "It was a cold start"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BuiltState:
    """The tiny Llama model, unprimed."""
    built = new_state(tmp_path_factory.mktemp("tiny") / "state")
    with open_hugging_face(DATA / "tiny_llama") as source:
        build_snapshot(source, "tiny", built.store, built.keyring)
    return built


def prime(built: BuiltState, name: str, **options: object) -> Manifest:
    """A snapshot over the tiny model's weights, primed as ``options`` say."""
    build_over_weights("tiny", name, built.store, built.keyring, priming=Priming(**options))  # type: ignore[arg-type]
    return built.manifest(name)


@contextmanager
def restored(built: BuiltState, manifest: Manifest) -> Iterator[RestoredModel]:
    """The snapshot as a worker has it."""
    with ExitStack() as stack:
        fds = []
        for ref in manifest.worker_blobs:
            fds.append(seal_blob(built.store.blob_path(ref), ref).fd)
            stack.callback(os.close, fds[-1])
        engine = stack.enter_context(GuestEngine())
        engine.start_ticker()
        yield restore_model(manifest, fds[0], fds[1], engine, 1, *fds[2:])


def complete(loaded: LoadedModel, backend: str, prompt: str, num_tokens: int) -> Outcome:
    """One greedy request on an engine over ``loaded``."""
    outcome = Outcome()

    def on_steps(steps: list[RequestStep]) -> None:
        for step in steps:
            outcome.events += step.events
            outcome.final = step if step.finished else None

    bound = make_backend(backend, 1).bind(loaded.plan)
    engine = Engine(loaded, bound, max_running=4, kv_budget_bytes=1 << 26, on_steps=on_steps)
    mail = Mail(requests=[make_request("r", prompt, greedy(num_tokens, ignore_eos=True))])
    while outcome.final is None:
        engine.run_round(mail)
        mail = Mail()
    bound.close()
    return outcome


def render(manifest: Manifest, *contents: tuple[str, str]) -> str:
    """The prompt that the gateway makes of a chat."""
    card = manifest.card
    model = ModelCard("m", chat_template=card.chat_template, bos_token=card.bos_token, eos_token=card.eos_token)
    return ChatTemplates().render(model, [{"role": role, "content": text} for role, text in contents])


@pytest.mark.parametrize("backend", ["numpy", "numkong"])
def test_primed_snapshot_answers_as_the_unprimed_one(tiny: BuiltState, backend: str) -> None:
    """System prompts and texts: the same greedy tokens, the whole prefix cached, no other prompt affected."""
    plain = tiny.manifest("tiny")
    primed = prime(tiny, f"primed-{backend}", backend=backend, system_prompts=(SYSTEM, OTHER_SYSTEM), texts=(TEXT,))
    assert {prefix.computed_with for prefix in primed.prefixes} == {backend}
    prompts = [
        render(plain, ("system", SYSTEM), ("user", "Why?")),
        render(plain, ("system", OTHER_SYSTEM), ("user", "hello"), ("assistant", "hi"), ("user", "\nagain")),
        TEXT + " in the morning",
        "nothing of this was primed",
    ]
    lengths = sorted(prefix.num_tokens for prefix in primed.prefixes)
    cached = []
    with restored(tiny, plain) as one, restored(tiny, primed) as other:
        for prompt in prompts:
            expected = complete(one.loaded, backend, prompt, 12)
            found = complete(other.loaded, backend, prompt, 12)
            assert found.token_ids() == expected.token_ids()
            assert expected.final is not None
            assert expected.final.usage.cached_tokens == 0
            assert found.final is not None
            cached.append(found.final.usage.cached_tokens)
    assert sorted(cached[:3]) == lengths
    assert cached[3] == 0


def test_prefix_ends_where_prompts_begin_to_differ(tiny: BuiltState) -> None:
    """The stored ids are the longest beginning that renderings share, in the words of template and tokeniser."""
    primed = prime(tiny, "ends", system_prompts=(SYSTEM,))
    with restored(tiny, primed) as model:
        text = model.loaded.text
        (prefix,) = primed.prefixes
        shown = text.detokenize(list(prefix.unpack_token_ids()), show_special=True)
        rendered = render(primed, ("system", SYSTEM), ("user", "Really?"))
        assert rendered.startswith(shown)
        assert shown.endswith("user\n")
        del text


def test_default_prompt_is_primed_only_where_the_template_writes_one(tiny: BuiltState, tmp_path: Path) -> None:
    """A template without a default system prompt primes nothing; one with it does; ``default_prompt`` switches it."""
    assert prime(tiny, "bare").prefixes == ()
    folder = Path(shutil.copytree(DATA / "tiny_llama", tmp_path / "model"))
    config = folder / "tokenizer_config.json"
    text = config.read_text()
    marked = text.replace('"{% for', '"<|im_start|>system\\nYou are a helpful test.<|im_end|>\\n{% for', 1)
    assert marked != text
    config.write_text(marked)
    built = new_state(tmp_path / "state")
    for name, wanted, count in (("with", True, 1), ("without", False, 0)):
        with open_hugging_face(folder) as source:
            priming = Priming(default_prompt=wanted)
            report = build_snapshot(source, name, built.store, built.keyring, priming=priming)
        manifest = built.manifest(name)
        assert len(manifest.prefixes) == len(report.primed_tokens) == count
        assert (PRIMED_PREFIXES in manifest.blobs) == bool(count)
        assert built.store.verify(name, built.keyring) == []


def test_prefixes_that_begin_others_are_stored_once(tiny: BuiltState) -> None:
    """Equal prompts, and one that another begins with, take no second place."""
    longer = TEXT + " which took all night"
    primed = prime(tiny, "once", texts=(longer, TEXT, longer), system_prompts=(SYSTEM, SYSTEM))
    assert len(primed.prefixes) == 2
    ids = [prefix.unpack_token_ids() for prefix in primed.prefixes]
    assert all(share_beginning([a, b]) not in (a, b) for a in ids for b in ids if a is not b)


def test_what_cannot_be_primed_is_said(tiny: BuiltState) -> None:
    """Longer than the context, nothing in common, too many: an error by name, and no snapshot."""
    for options, words in (
        ({"texts": ("word " * 400,)}, "fewer than the context's"),
        ({"system_prompts": ("long " * 400,)}, "fewer than the context's"),
        ({"texts": tuple(f"{i} different beginnings" for i in range(70))}, "at most 64"),
        ({"texts": (TEXT,), "backend": "abacus"}, "abacus"),
    ):
        with pytest.raises(BuildError, match=words):
            prime(tiny, "refused", **options)  # type: ignore[arg-type]
    assert "refused" not in tiny.store.list_names()


def test_model_without_template_refuses_system_prompts_only(tiny: BuiltState, tmp_path: Path) -> None:
    """Texts can be primed without a chat template; a system prompt cannot."""
    folder = Path(shutil.copytree(DATA / "tiny_llama", tmp_path / "model"))
    (folder / "tokenizer_config.json").write_text("{}")
    built = new_state(tmp_path / "state")
    with open_hugging_face(folder) as source:
        with pytest.raises(BuildError, match="no chat template"):
            build_snapshot(source, "m", built.store, built.keyring, priming=Priming(system_prompts=(SYSTEM,)))
        build_snapshot(source, "m", built.store, built.keyring, priming=Priming(texts=(TEXT,)))
    assert len(built.manifest("m").prefixes) == 1


def test_changed_prefix_bytes_are_refused_before_use(tiny: BuiltState) -> None:
    """The blob is verified like the weights, and without its sealed memory a primed snapshot does not restore."""
    primed = prime(tiny, "tampered", texts=("a prefix of its own, changed later on",))
    ref = primed.blobs[PRIMED_PREFIXES]
    path = tiny.store.blob_path(ref)
    flip_byte(path, 5)
    with pytest.raises(BlobCorrupt):
        seal_blob(path, ref)
    assert tiny.store.verify("tampered", tiny.keyring) != []
    flip_byte(path, 5)
    with GuestEngine() as engine, ExitStack() as stack:
        fds = [seal_blob(tiny.store.blob_path(ref), ref).fd for ref in primed.worker_blobs]
        for fd in fds:
            stack.callback(os.close, fd)
        with pytest.raises(MappingError):
            restore_model(primed, fds[0], fds[1], engine, seed=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layout": 2}, "layout 2"),
        ({"dtype": "BF16"}, "BF16"),
        ({"computed_with": "NumKong!"}, "no backend's name"),
        ({"token_ids": b"\x01\x00\x00"}, "token ids"),
        ({"token_ids": b""}, "token ids"),
        ({"token_ids": b"\xff\xff\xff\xff"}, "vocabulary"),
        ({"size_bytes": 4096}, "take"),
        ({"offset": 64}, "multiple of 4096"),
        ({"offset": -4096}, "multiple of 4096"),
        ({"offset": 1 << 40}, "ends at byte"),
    ],
)
def test_prefix_that_contradicts_the_model_is_malformed(
    tiny: BuiltState, changes: dict[str, object], words: str
) -> None:
    """Every field is checked against the card and the blob when a manifest is signed and when it is read."""
    primed = prime(tiny, "checked", texts=(TEXT,))
    broken = msgspec.structs.replace(primed.prefixes[0], **changes)
    with pytest.raises(ManifestMalformed, match=words):
        validate_manifest(msgspec.structs.replace(primed, prefixes=(broken,)))


def test_real_model_primes_its_default_system_prompt(smollm2_built: BuiltState, tmp_path: Path) -> None:
    """SmolLM2's template writes a system prompt of its own: 24 tokens, found in the reference prompt, same answer."""
    built = copy_linked(smollm2_built, tmp_path / "state")
    report = build_over_weights(SMOLLM2, "primed", built.store, built.keyring, priming=Priming(num_threads=1))
    primed = built.manifest("primed")
    assert report.primed_tokens == (24,)
    plain = built.manifest(SMOLLM2)
    assert plain.weights == primed.weights
    prompt = render(plain, ("user", "What is the capital of France?"))
    with restored(built, primed) as model:
        found = complete(model.loaded, "numkong", prompt, 8)
        token_ids = tuple(model.loaded.text.tokenize(prompt, add_special=True, parse_special=True))
        primed_logits, portioned, at_once = compare_logits(model.loaded, token_ids)
        whole = complete(LoadedModel("m", "s", model.loaded.plan, model.loaded.text, (2,)), "numkong", prompt, 8)
    assert found.final is not None
    assert (found.final.usage.prompt_tokens, found.final.usage.cached_tokens) == (37, 24)
    assert found.token_ids() == whole.token_ids()
    assert found.text().startswith("The capital of France is Paris.")
    np.testing.assert_array_equal(primed_logits, portioned)
    best = np.argsort(at_once)[-5:]
    # Measured 0.03: products of 37 and of 13 columns round their bf16 activations after sums in another order.
    assert np.abs(log_softmax(primed_logits) - log_softmax(at_once))[best].max() < 0.15


def compare_logits(loaded: LoadedModel, token_ids: Sequence[int]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The last token's logits on NumKong: behind the primed prefix; computed in the same two portions; and at once."""
    bound = make_backend("numkong", 1).bind(loaded.plan)
    keys_values = loaded.prefixes.find(token_ids)
    assert keys_values is not None
    first, rest = tuple(token_ids[: keys_values.shape[3]]), tuple(token_ids[keys_values.shape[3] :])
    bound.open_kv(12)
    primed, portioned, at_once = ((i, i + 1, i + 2, i + 3) for i in (0, 4, 8))
    bound.restore_prefix(primed, keys_values)
    bound.step((SequenceInput(portioned, 0, first, num_logits=0),))
    steps = [(primed, len(first), rest), (portioned, len(first), rest), (at_once, 0, tuple(token_ids))]
    found = [compute_logits(bound, SequenceInput(*step))[0] for step in steps]
    bound.close()
    return found[0], found[1], found[2]


def log_softmax(logits: FloatArray) -> FloatArray:
    """Natural logarithms of the probabilities."""
    shifted: FloatArray = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def copy_linked(built: BuiltState, target: Path) -> BuiltState:
    """A state folder whose blobs are hard links: they are read-only, and a build adds files of its own."""
    shutil.copytree(built.state_dir / "store", target / "store", copy_function=os.link)
    shutil.copytree(built.state_dir / "keys", target / "keys")
    return BuiltState(target)
