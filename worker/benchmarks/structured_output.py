"""Structured output on a real model: schemas from seeds, an answer to each, every answer validated.

    python -m worker.benchmarks.structured_output [--schemas N] [--json FILE]

Needs the ``jsonschema`` package. An answer that ends by its length was cut, and is counted apart. The exit code is 1
where an answer does not validate or a schema was refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from scheduler.contract.messages import OutputGrammar, SamplingParams
from scheduler.contract.states import GrammarKind
from worker.benchmarks.engine_model import EngineDriver, Timeline, add_options, describe_machine, open_model
from worker.benchmarks.schema_generator import Schema, generate_schema
from worker.engine.types import EngineRequest
from worker.loaded_model import LoadedModel

PROMPT: Final = "<|im_start|>user\nWrite one JSON value for the schema {schema}<|im_end|>\n<|im_start|>assistant\n"
MAX_PROMPT_CHARS: Final = 600  # of the schema: the model sees enough of it, and the grammar has it all
BATCH: Final = 16


@dataclass
class Outcome:
    """What became of all schemas."""

    num_schemas: int = 0
    num_valid: int = 0
    num_cut_by_length: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    invalid: list[str] = field(default_factory=list)


def run(model: LoadedModel, options: argparse.Namespace) -> Outcome:
    """Ask for an answer to each schema, :data:`BATCH` at a time, half of them greedily and half at temperature 1."""
    driver = EngineDriver(
        model, options.backend, options.threads, kv_budget_bytes=1 << 30, max_draft_tokens=options.draft_tokens
    )
    outcome, begin_s = Outcome(), time.monotonic()
    waiting = list(range(options.schemas))[::-1]
    asked: list[tuple[int, Schema, Timeline]] = []
    while waiting or asked:
        while waiting and len(asked) < BATCH:
            seed = waiting.pop()
            schema = generate_schema(seed)
            asked.append((seed, schema, driver.submit(_make_request(model, seed, schema, options.max_tokens))))
        driver.run_round()
        for entry in [entry for entry in asked if entry[2].is_done]:
            asked.remove(entry)
            _judge(model, options.max_tokens, *entry, outcome)
            if outcome.num_schemas % 20 == 0:
                progress = f"{outcome.num_valid} valid, {outcome.num_cut_by_length} cut"
                print(f"{outcome.num_schemas} schemas: {progress}", file=sys.stderr, flush=True)
    outcome.seconds = round(time.monotonic() - begin_s, 1)
    driver.close()
    return outcome


def _judge(
    model: LoadedModel, max_tokens: int, seed: int, schema: Schema, timeline: Timeline, outcome: Outcome
) -> None:
    from jsonschema import Draft202012Validator  # a development dependency

    outcome.num_schemas += 1
    outcome.num_tokens += len(timeline.token_ids)
    if len(timeline.token_ids) >= max_tokens:
        outcome.num_cut_by_length += 1
        return
    text = model.text.detokenize(timeline.token_ids)
    try:
        Draft202012Validator(schema).validate(json.loads(text))
        outcome.num_valid += 1
    except Exception as error:  # whatever is wrong with the answer is what this looks for
        outcome.invalid.append(f"seed {seed}: {type(error).__name__}: {text[:200]}")


def _make_request(model: LoadedModel, seed: int, schema: Schema, max_tokens: int) -> EngineRequest:
    source = json.dumps(schema)
    prompt = model.text.tokenize(PROMPT.format(schema=source[:MAX_PROMPT_CHARS]), add_special=False, parse_special=True)
    sampling = SamplingParams(
        seed=seed,
        max_tokens=max_tokens,
        temperature=float(seed % 2),
        grammar=OutputGrammar(GrammarKind.JSON_SCHEMA, source),
    )
    return EngineRequest(f"schema-{seed}", tuple(prompt), sampling)


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker.benchmarks.structured_output", description=__doc__)
    add_options(parser)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=768)
    parser.add_argument("--draft-tokens", type=int, default=0, help="tokens guessed ahead (default: 0)")
    options = parser.parse_args(arguments)
    with open_model(options.source, options.weights) as model:
        outcome = run(model, options)
    figures: dict[str, Any] = {"machine": describe_machine(), **asdict(outcome)}
    print(json.dumps(figures, indent=1, ensure_ascii=False))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if outcome.num_valid + outcome.num_cut_by_length == outcome.num_schemas else 1


if __name__ == "__main__":
    sys.exit(main())
