"""What an engine tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A consistent picture after a step. Safe to read from any thread."""

    num_running: int = 0  # requests in the batch
    num_waiting: int = 0  # requests accepted, without KV memory
    kv_used_bytes: int = 0  # held by running sequences
    tokens_generated: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    kv_total_bytes: int = 0  # all blocks: the budget, rounded down to whole ones
    kv_cached_bytes: int = 0  # kept for prompts to come, given up when running sequences need it
    num_prompt_tokens: int = 0  # of admitted requests
    num_cached_tokens: int = 0  # of these, taken over instead of computed
    num_drafted_tokens: int = 0  # guessed ahead
    num_kept_tokens: int = 0  # of these, sampled too
