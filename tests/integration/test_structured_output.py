"""A hundred schemas over SmolLM2's own tokeniser: whatever a random model answers under its grammar validates."""

from __future__ import annotations

import json
from dataclasses import replace

from engine_fixtures import EngineHarness, Outcome
from jsonschema import Draft202012Validator
from llama_fixtures import loaded_guest, one_layer_config, smollm2_spec
from llama_programs import random_plan

from guests.text import GuestText
from scheduler.contract.messages import OutputGrammar, SamplingParams
from scheduler.contract.states import FinishReason, GrammarKind
from worker.benchmarks.schema_generator import Schema, generate_schema
from worker.engine.types import EngineRequest

NUM_SCHEMAS = 100
IN_FLIGHT = 16
MAX_TOKENS = 900


def ask(harness: EngineHarness, seed: int) -> tuple[Schema, Outcome]:
    """A request for an answer to the schema of ``seed``, at a temperature that makes a random model wild."""
    schema = generate_schema(seed)
    grammar = OutputGrammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    sampling = SamplingParams(seed=seed, max_tokens=MAX_TOKENS, temperature=2.0, top_k=200, grammar=grammar)
    return schema, harness.submit(EngineRequest(f"s{seed}", (5, 6, 7), sampling))


def test_every_answer_validates() -> None:
    """None is refused, none is invalid, none runs on to its length: recursion and digits have an end."""
    spec = smollm2_spec()
    config = replace(one_layer_config(len(spec.tokens)), context_length=1024)
    num_valid = num_cut = num_tokens = 0
    with loaded_guest(spec) as module:
        text = GuestText(module, seed=1)
        harness = EngineHarness(
            max_running=IN_FLIGHT,
            plan=random_plan(config),
            text=text,
            open_text=lambda: GuestText(module, seed=2),
            max_draft_tokens=4,
        )
        waiting, running = list(range(NUM_SCHEMAS)), list[tuple[Schema, Outcome]]()
        while waiting or running:
            while waiting and len(running) < IN_FLIGHT:
                running.append(ask(harness, waiting.pop()))
            harness.run_round()
            for schema, outcome in [entry for entry in running if entry[1].final is not None]:
                running.remove((schema, outcome))
                assert outcome.final is not None
                assert outcome.final.error is None, outcome.final.error
                num_tokens += len(outcome.events)
                if outcome.finish_reasons()[0] == FinishReason.LENGTH:
                    num_cut += 1
                    continue
                Draft202012Validator(schema).validate(json.loads(outcome.text()))
                num_valid += 1
        harness.engine._grammars.close()
        text.close()
    print(f"{NUM_SCHEMAS} schemas: {num_valid} answers valid, {num_cut} cut by their length, {num_tokens} tokens")
    assert num_valid + num_cut == NUM_SCHEMAS
    assert num_cut == 0
