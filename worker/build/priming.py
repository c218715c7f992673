"""Primed prefixes: which tokens prompts will begin with, and their keys and values, computed once at build.

The tokens are found the way serving finds them: the text is rendered by the gateway's own template code and tokenised
by the snapshot's guest. Two continuations are rendered; what both begin with is what every prompt begins with. The
keys and values are computed by the backend that serves, from the very blobs of the snapshot, restored as a worker
restores them, in the engine's own portions: a primed request then differs from an unprimed one at most in the order of
some sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

import msgspec
import numpy as np
import structlog

from guests.errors import GuestError
from guests.runtime import GuestEngine
from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.errors import GlowplugError
from scheduler.contract.messages import ModelCard, SamplingParams
from snapshots.blob_reference import BlobRef
from snapshots.blob_writer import BlobWriter
from snapshots.errors import MappingError
from snapshots.keyring import KeyRing
from snapshots.manifest import PRIMED_PREFIXES, Manifest
from snapshots.mapping import seal_blob
from snapshots.sections import MAX_PREFIXES, PrimedPrefix, fill_up, plan_prefixes
from snapshots.store import SnapshotStore
from worker.backends.choice import make_backend
from worker.backends.protocol import BackendError, BoundModel, FloatArray, SequenceInput
from worker.build.errors import BuildError
from worker.engine.batch import PREFILL_TOKENS_PER_STEP
from worker.engine.intake import tokenize_prompt
from worker.engine.kv_cache import count_blocks
from worker.engine.text import TextModel
from worker.engine.types import EngineRequest
from worker.loaded_model import LoadedModel
from worker.reports import read_memory_available_bytes
from worker.restore import RestoredModel, restore_model

#: What a template writes before every first message is primed by default from this many tokens on: fewer (a bare
#: ``<|im_start|>user``) take no time to compute that could be saved.
MIN_DEFAULT_TOKENS: Final = 8
#: Begin with a letter and a digit, which no vocabulary joins with whatever stands before them in the same way.
MESSAGES: Final = ("a", "7")
#: A raw text may also go on with a space or a line break.
TEXTS: Final = ("a", "7", " a", "\n")

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Priming:
    """What to prime. ``default_prompt``: what the chat template writes before any user message (its default system
    prompt), where that is long enough to matter. ``backend`` computes it."""

    default_prompt: bool = True
    system_prompts: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    backend: str = "numkong"
    num_threads: int = 0  # 0: one for each usable core

    @property
    def is_explicit(self) -> bool:
        """Whether somebody asked for it, so that failing to do it is an error."""
        return bool(self.system_prompts or self.texts)


def prime_snapshot(
    manifest: Manifest,
    store: SnapshotStore,
    keyring: KeyRing,
    priming: Priming,
    *,
    encrypt_with: KeyRing | None = None,
    with_verity: bool = False,
) -> Manifest:
    """``manifest`` with its primed prefixes, their blob written; the same manifest where there is nothing to prime.

    Requires: its blobs are in the store. Takes the weights' size in memory. Blocks.

    Raises:
        BuildError: what was asked for cannot be primed. Where only the default would be primed, that is logged instead.
        SnapshotError: the store, the keys or the blobs fail.
    """
    wants_default = priming.default_prompt and manifest.card.chat_template is not None
    if not priming.is_explicit and not wants_default:
        return manifest
    if manifest.vector_size:
        raise BuildError(f"{manifest.name!r} is an encoder: it keeps no keys and values that could be primed")
    try:
        with restored_snapshot(manifest, store, keyring) as restored:
            prefixes = choose_prefixes(priming, manifest, restored.loaded.text)
            if not prefixes:
                return manifest
            entries = plan_prefixes(prefixes, manifest.prefix_shape, priming.backend)
            with store.add_blob(encrypt_with=encrypt_with, with_verity=with_verity) as writer:
                _write_prefixes(writer, entries, restored.loaded, priming)
    except (GuestError, BackendError, BuildError) as error:
        if priming.is_explicit:
            raise BuildError(f"cannot prime {manifest.name!r}: {error}") from error
        _log.warning("default_prompt_not_primed", snapshot=manifest.name, reason=str(error))
        return manifest
    blobs = {**manifest.blobs, PRIMED_PREFIXES: writer.ref}
    return msgspec.structs.replace(manifest, blobs=blobs, prefixes=tuple(entries))


def choose_prefixes(priming: Priming, manifest: Manifest, text: TextModel) -> list[tuple[int, ...]]:
    """Token ids to prime, none the beginning of another: a prompt adopts beginnings of prefixes too.

    Raises:
        BuildError: no chat template, or it refuses a system prompt; a text of no tokens or longer than the context.
    """
    card = manifest.card
    renderable = ModelCard(
        manifest.name, chat_template=card.chat_template, bos_token=card.bos_token, eos_token=card.eos_token
    )
    found = [_prefix_of_chat(renderable, system, text) for system in priming.system_prompts]
    found += [_prefix_of_text(raw, text) for raw in priming.texts]
    for token_ids in found:
        if not 0 < len(token_ids) < card.context_length:
            raise BuildError(
                f"a text to prime has {len(token_ids)} tokens that every continuation shares: expected at least 1, "
                f"and fewer than the context's {card.context_length}"
            )
    if priming.default_prompt and card.chat_template is not None:
        default = _prefix_of_chat(renderable, None, text)
        if MIN_DEFAULT_TOKENS <= len(default) < card.context_length:
            found.append(default)
    longest = [ids for ids in dict.fromkeys(found) if not any(o != ids and o[: len(ids)] == ids for o in found)]
    if len(longest) > MAX_PREFIXES:
        raise BuildError(f"{len(longest)} prefixes to prime, at most {MAX_PREFIXES} in a snapshot")
    return longest


def share_beginning(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What all ``sequences`` begin with."""
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return tuple(column[0] for column in columns)


def _prefix_of_chat(card: ModelCard, system: str | None, text: TextModel) -> tuple[int, ...]:
    """What every chat begins with: up to the first user message's own words.

    Raises:
        BuildError: the template refuses the messages, or there is none.
    """
    leading = [] if system is None else [{"role": "system", "content": system}]
    try:
        prompts = [
            ChatTemplates().render(card, [*leading, {"role": "user", "content": message}]) for message in MESSAGES
        ]
    except GlowplugError as error:
        raise BuildError(f"a system prompt cannot be primed: {error.info.message}") from error
    return share_beginning([_tokenize(prompt, text, add_special=False) for prompt in prompts])


def _prefix_of_text(raw: str, text: TextModel) -> tuple[int, ...]:
    return share_beginning([_tokenize(raw + continuation, text, add_special=True) for continuation in TEXTS])


def _tokenize(prompt: str, text: TextModel, *, add_special: bool) -> tuple[int, ...]:
    """As the engine does it for a request with this prompt: a chat's template writes special tokens itself."""
    request = EngineRequest("priming", prompt, SamplingParams(seed=0, max_tokens=1), add_special=add_special)
    return tokenize_prompt(request, text)


@contextmanager
def restored_snapshot(manifest: Manifest, store: SnapshotStore, keyring: KeyRing) -> Iterator[RestoredModel]:
    """The snapshot as a worker sees it.

    Raises:
        BuildError: too little memory for the weights.
    """
    needed_bytes, available_bytes = manifest.weights.size_bytes, read_memory_available_bytes()
    if needed_bytes > available_bytes:
        raise BuildError(f"{needed_bytes} bytes of weights do not fit the {available_bytes} bytes of free memory")
    with ExitStack() as stack:

        def seal(ref: BlobRef) -> int:
            sealed = seal_blob(store.blob_path(ref), ref, keyring=keyring)
            stack.callback(os.close, sealed.fd)
            return sealed.fd

        engine = stack.enter_context(GuestEngine())
        engine.start_ticker()
        weights_fd, guest_fd, *further_fds = map(seal, manifest.worker_blobs)
        restored = restore_model(manifest, weights_fd, guest_fd, engine, 0, *further_fds)
        try:
            yield restored
        finally:
            with suppress(MappingError):  # after an error its frames still hold arrays: the mapping goes with them
                restored.close()


def _write_prefixes(writer: BlobWriter, entries: list[PrimedPrefix], loaded: LoadedModel, priming: Priming) -> None:
    """Compute each prefix and append it to the blob, as :func:`plan_prefixes` laid them out."""
    backend = make_backend(priming.backend, priming.num_threads)
    backend.warm()
    bound = backend.bind(loaded.plan)
    bound.open_kv(max(count_blocks(entry.num_tokens) for entry in entries))
    try:
        for entry in entries:
            keys_values = compute_prefix(bound, entry.unpack_token_ids())
            writer.write(np.ascontiguousarray(keys_values, "<f4").reshape(-1).view(np.uint8).data)
            writer.write(memoryview(fill_up(entry.size_bytes)))
    finally:
        bound.close()


def compute_prefix(bound: BoundModel, token_ids: Sequence[int]) -> FloatArray:
    """Keys and values of ``token_ids``, computed in the portions in which the engine prefills a lone prompt.

    Requires: ``bound`` has KV blocks enough, which nobody else uses.
    """
    block_table = tuple(range(count_blocks(len(token_ids))))
    for start in range(0, len(token_ids), PREFILL_TOKENS_PER_STEP):
        portion = tuple(token_ids[start : start + PREFILL_TOKENS_PER_STEP])
        bound.step((SequenceInput(block_table, start, portion, num_logits=0),))
    return bound.capture_prefix(block_table, len(token_ids))
