"""What weight formats cost in quality: perplexity and choices on a fixed text, against the float32 snapshot.

    python -m worker.benchmarks.weight_quality STATE_DIR REFERENCE NAME... [--text FILE] [--json FILE]

All snapshots are of one model; ``REFERENCE`` is built with ``--dtype f32``. The text is cut into pieces of 128 tokens,
each fed from an empty cache; at every position the next token's distribution is compared with the reference's. The
greedy figure runs freely: from each piece's first half, how many tokens until the first that differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from snapshots.keyring import KeyRing
from snapshots.store import SnapshotStore
from worker.backends.choice import make_backend
from worker.backends.protocol import KV_BLOCK_TOKENS, BoundModel, FloatArray, SequenceInput
from worker.build.priming import restored_snapshot

TEXT: Final = Path(__file__).with_name("quality_text.txt")
PIECE_TOKENS: Final = 128
GREEDY_TOKENS: Final = 32


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model says about each piece."""

    logprobs: FloatArray  # [pieces, tokens, V]
    greedy: list[list[int]]  # continuations of each piece's first half


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one snapshot. ``kl_nats`` and the agreements are against the reference."""

    name: str
    perplexity: float
    kl_nats: float  # mean over positions
    top1_agreement: float  # share of positions with the same most likely token
    greedy_prefix_tokens: float  # mean number of greedy tokens before the first that differs


def predict(bound: BoundModel, pieces: npt.NDArray[np.int64], vocab_size: int) -> Predictions:
    """Log-probabilities at every position, and greedy continuations."""
    num_blocks = -(-(PIECE_TOKENS + GREEDY_TOKENS) // KV_BLOCK_TOKENS)
    bound.open_kv(num_blocks)
    table = tuple(range(num_blocks))
    logprobs = np.empty((*pieces.shape, vocab_size), np.float32)
    greedy = []
    for index, piece in enumerate(pieces):
        token_ids = tuple(int(token) for token in piece)
        logits = run_step(bound, SequenceInput(table, 0, token_ids, num_logits=len(token_ids)))
        logprobs[index] = _log_softmax(logits)
        greedy.append(_continue_greedily(bound, table, token_ids[: len(token_ids) // 2]))
    return Predictions(logprobs, greedy)


def run_step(bound: BoundModel, share: SequenceInput) -> FloatArray:
    """Logits of one sequence's step."""
    bound.step((share,))
    return bound.logits()


def _continue_greedily(bound: BoundModel, table: tuple[int, ...], prompt: tuple[int, ...]) -> list[int]:
    found: list[int] = []
    start, share = 0, prompt
    while len(found) < GREEDY_TOKENS:
        logits = run_step(bound, SequenceInput(table, start, share))
        start, share = start + len(share), (int(logits[0].argmax()),)
        found += share
    return found


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def compare(name: str, found: Predictions, reference: Predictions, pieces: npt.NDArray[np.int64]) -> Quality:
    """The figures of ``found``."""
    targets = pieces[:, 1:, None]
    nll = -np.take_along_axis(found.logprobs[:, :-1], targets, 2).mean(dtype=np.float64)
    kl = (np.exp(reference.logprobs) * (reference.logprobs - found.logprobs)).sum(axis=2, dtype=np.float64)
    same = found.logprobs.argmax(axis=2) == reference.logprobs.argmax(axis=2)
    prefixes = [count_shared(ours, theirs) for ours, theirs in zip(found.greedy, reference.greedy, strict=True)]
    return Quality(name, float(np.exp(nll)), float(kl.mean()), float(same.mean()), statistics.mean(prefixes))


def count_shared(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first that differs."""
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other:
            return index
    return len(ours)


def measure(
    store: SnapshotStore,
    keyring: KeyRing,
    names: list[str],
    max_pieces: int | None = None,
    text: Path = TEXT,
    backend: str = "numkong",
) -> list[Quality]:
    """Figures of each snapshot on ``text``; the first one is the reference."""
    pieces: npt.NDArray[np.int64] | None = None
    reference: Predictions | None = None
    results = []
    for name in names:
        with restored_snapshot(store.read_manifest(name, keyring), store, keyring) as restored:
            loaded = restored.loaded
            if pieces is None:
                token_ids = loaded.text.tokenize(
                    text.read_text(encoding="utf-8"), add_special=False, parse_special=False
                )
                num_pieces = min(len(token_ids) // PIECE_TOKENS, max_pieces or len(token_ids))
                pieces = np.array(token_ids[: num_pieces * PIECE_TOKENS]).reshape(num_pieces, PIECE_TOKENS)
            bound = make_backend(backend, 0).bind(loaded.plan)
            try:
                found = predict(bound, pieces, loaded.plan.vocab_size)
            finally:
                bound.close()
            reference = reference or found
            results.append(compare(name, found, reference, pieces))
    return results


def show(results: list[Quality]) -> list[str]:
    """A table in Markdown."""
    lines = ["| snapshot | perplexity | KL, nats | same most likely token | greedy tokens until one differs |"]
    lines.append("|---|---|---|---|---|")
    for quality in results:
        lines.append(
            f"| {quality.name} | {quality.perplexity:.3f} | {quality.kl_nats:.5f} | {quality.top1_agreement:.1%} | "
            f"{quality.greedy_prefix_tokens:.1f} of {GREEDY_TOKENS} |"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker.benchmarks.weight_quality", description=__doc__)
    parser.add_argument("state_dir", type=Path, help="as `glowplug build --state-dir` left it")
    parser.add_argument("names", nargs="+", help="snapshots of one model, the float32 one first")
    parser.add_argument("--text", type=Path, default=TEXT, metavar="FILE", help="instead of the one beside this file")
    parser.add_argument("--pieces", type=int, metavar="N", help="of the text, at most")
    parser.add_argument("--backend", default="numkong", help="numpy for formats that are for GPUs (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args(arguments)
    keyring = KeyRing.from_file(options.state_dir / "keys" / "snapshot.keys")
    store = SnapshotStore(options.state_dir / "store")
    results = measure(store, keyring, options.names, options.pieces, options.text, options.backend)
    print("\n".join(show(results)))
    if options.json is not None:
        found: list[dict[str, Any]] = [asdict(quality) for quality in results]
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
