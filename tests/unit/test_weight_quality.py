"""The quality figures of weight formats: perplexity, divergence and agreement against a reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from llama_programs import TINY, random_plan

from worker.backends.numkong_cpu import NumKongBackend
from worker.benchmarks.weight_quality import PIECE_TOKENS, TEXT, Predictions, compare, count_shared, predict, show

CONFIG = replace(TINY, context_length=256)


def _predict(dtype: str) -> tuple[Predictions, np.ndarray]:
    pieces = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (2, PIECE_TOKENS))
    bound = NumKongBackend(1).bind(random_plan(CONFIG, dtype=dtype))
    return predict(bound, pieces, CONFIG.vocab_size), pieces


def test_a_model_agrees_with_itself() -> None:
    """No divergence, every choice the same, and the perplexity of a distribution over the vocabulary."""
    found, pieces = _predict("float32")
    quality = compare("same", found, found, pieces)
    assert quality.kl_nats == pytest.approx(0, abs=1e-9)
    assert (quality.top1_agreement, quality.greedy_prefix_tokens) == (1.0, len(found.greedy[0]))
    assert 1 < quality.perplexity < 10 * CONFIG.vocab_size


def test_int8_diverges_a_little_and_is_reported() -> None:
    """Other weights give another distribution: the divergence is positive, and small for int8."""
    reference, pieces = _predict("float32")
    found, _ = _predict("int8")
    quality = compare("int8", found, reference, pieces)
    assert 0 < quality.kl_nats < 0.05
    assert quality.top1_agreement > 0.8
    assert "| int8 |" in show([quality])[-1]


def test_shared_beginning_ends_at_the_first_difference() -> None:
    """A later agreement does not count."""
    assert count_shared([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert count_shared([1, 2], [1, 2]) == 2


def test_text_is_long_enough_for_five_pieces() -> None:
    """The fixed text lies beside the benchmark, in the wheel too."""
    assert len(TEXT.read_text(encoding="utf-8").split()) > 500
