"""The engine's benchmarks run on a tiny model, agree with themselves and report what they promise."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from worker.benchmarks import attention_cost, long_prompt, prefix_cache

TINY = str(Path(__file__).resolve().parent.parent / "data" / "tiny_llama")


def test_prefix_cache_benchmark_counts_hits(tmp_path: Path) -> None:
    """Every repeated beginning is a hit while the cache holds all, and both engines give the same tokens."""
    target = tmp_path / "figures.json"
    options = ["--requests", "24", "--prefixes", "4", "--prefix-tokens", "40", "--question-tokens", "5"]
    assert prefix_cache.main(["--source", TINY, *options, "--kv-budget-mib", "4", "--json", str(target)]) == 0
    figures = json.loads(target.read_text())
    assert figures["hit_rate"] == figures["hit_rate_of_an_endless_cache"] > 0.5
    assert figures["num_equal_first_tokens"] == 24
    assert set(figures["ttft_p50_ms"]) == {"with", "without"}


def test_long_prompt_benchmark_measures_both_sides(tmp_path: Path) -> None:
    """Streams with and without the prompt, and the prompt alone and beside them, all have figures."""
    target = tmp_path / "figures.json"
    options = ["--streams", "2", "--prompt-tokens", "64", "--rounds", "6", "--runs", "1"]
    assert long_prompt.main(["--source", TINY, *options, "--json", str(target)]) == 0
    median = json.loads(target.read_text())["median"]
    assert all(median[name] > 0 for name in ("p99_ratio", "ttft_ratio", "without_p99_ms", "during_p99_ms"))


def test_attention_cost_is_measured_and_drawn(tmp_path: Path) -> None:
    """Each length that the model has gets its figures and its place in a well-formed picture."""
    target, picture = tmp_path / "figures.json", tmp_path / "cost.svg"
    options = ["--lengths", "16", "64", "128", "256", "--decodes", "3"]
    arguments = ["--source", TINY, *options, "--json", str(target), "--svg", str(picture)]
    assert attention_cost.main(arguments) == 0
    rows = json.loads(target.read_text())["lengths"]
    assert [row["num_tokens"] for row in rows] == [16, 64, 128]  # the model's context
    drawn = ElementTree.parse(picture).getroot()
    texts = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"16", "64", "128"} <= set(texts)
