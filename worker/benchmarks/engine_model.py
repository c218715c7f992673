"""A model for benchmarks of the engine: built into a temporary folder, restored as a worker does, driven by hand."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from guests.runtime import GuestEngine
from scheduler.contract.messages import SamplingParams
from snapshots.keyring import KeyRing
from snapshots.mapping import seal_blob
from snapshots.store import SnapshotStore
from worker.backends.choice import make_backend
from worker.benchmarks.guest_restore import describe_machine
from worker.build.model_sources import locate_source, open_located
from worker.build.quantize import WeightFormat
from worker.build.snapshot_builder import build_snapshot
from worker.engine.engine import Engine
from worker.engine.mailbox import Mail
from worker.engine.types import EngineRequest, RequestStep
from worker.loaded_model import LoadedModel
from worker.restore import restore_model

DEFAULT_SOURCE: Final = ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"
__all__ = [
    "DEFAULT_SOURCE",
    "EngineDriver",
    "Timeline",
    "add_options",
    "describe_machine",
    "make_request",
    "open_model",
]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark of the engine has."""
    parser.add_argument("--source", default=DEFAULT_SOURCE, help="GGUF file or Hugging Face folder (%(default)s)")
    parser.add_argument("--weights", default="bf16", choices=[form.value for form in WeightFormat])
    parser.add_argument("--backend", default="numkong")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each usable core")
    parser.add_argument("--json", type=Path, help="write the figures here")


@contextmanager
def open_model(source: str, weights: str) -> Iterator[LoadedModel]:
    """``source`` built with ``weights`` and restored out of sealed memory.

    Raises:
        BuildError: the source is refused.
    """
    with tempfile.TemporaryDirectory(prefix="gp-engine-") as folder, ExitStack() as stack:
        store = SnapshotStore(Path(folder) / "store")
        key_file = Path(folder) / "keys" / "snapshot.keys"
        KeyRing.generate_file(key_file)
        keyring = KeyRing.from_file(key_file)
        with open_located(locate_source(source, Path(folder))) as opened:
            build_snapshot(opened, "benchmark", store, keyring, weight_format=WeightFormat(weights))
        manifest = store.read_manifest("benchmark", keyring)
        fds = []
        for ref in manifest.worker_blobs:
            fds.append(seal_blob(store.blob_path(ref), ref).fd)
            stack.callback(os.close, fds[-1])
        guest_engine = stack.enter_context(GuestEngine())
        guest_engine.start_ticker()
        restored = restore_model(manifest, fds[0], fds[1], guest_engine, seed=1)
        yield restored.loaded  # mapped until the process ends: engines hold views of it


def make_request(request_id: str, prompt: tuple[int, ...], max_tokens: int, tenant: str = "") -> EngineRequest:
    """A greedy request that runs to its last token."""
    sampling = SamplingParams(seed=1, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return EngineRequest(request_id, prompt, sampling, tenant=tenant)


@dataclass
class Timeline:
    """When one request was handed in and when each token came, in monotonic nanoseconds."""

    submitted_ns: int
    token_ns: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)  # of each token, where the request wants them
    cached_tokens: int = 0
    is_done: bool = False

    @property
    def first_token_ns(self) -> int:
        """From handing in to the first token."""
        return self.token_ns[0] - self.submitted_ns

    def gaps_ns(self, begin_ns: int = 0, end_ns: int = 1 << 63) -> list[int]:
        """Durations between tokens that came in ``[begin_ns, end_ns)``."""
        pairs = zip(self.token_ns, self.token_ns[1:], strict=False)
        return [after - before for before, after in pairs if begin_ns <= after < end_ns]


class EngineDriver:
    """An engine driven on the caller's thread, round by round."""

    def __init__(
        self,
        model: LoadedModel,
        backend: str,
        num_threads: int,
        *,
        kv_budget_bytes: int,
        max_running: int = 16,
        prefix_caching: bool = True,
        max_draft_tokens: int = 0,
    ) -> None:
        made = make_backend(backend, num_threads)
        made.warm()
        self.timelines: dict[str, Timeline] = {}
        self._bound = made.bind(model.plan)
        self.engine = Engine(
            model,
            self._bound,
            max_running=max_running,
            kv_budget_bytes=kv_budget_bytes,
            on_steps=self._on_steps,
            prefix_caching=prefix_caching,
            max_draft_tokens=max_draft_tokens,
        )
        self._mail = Mail()

    def submit(self, request: EngineRequest) -> Timeline:
        """Hand ``request`` to the next round."""
        self._mail.requests.append(request)
        timeline = self.timelines[request.request_id] = Timeline(time.monotonic_ns())
        return timeline

    def run_round(self) -> None:
        """One round of the engine."""
        mail, self._mail = self._mail, Mail()
        self.engine.run_round(mail)

    def run_until_done(self) -> None:
        """Rounds until every request has ended."""
        while not all(timeline.is_done for timeline in self.timelines.values()):
            self.run_round()

    def close(self) -> None:
        """Free the backend's memory."""
        self._bound.close()

    def _on_steps(self, steps: list[RequestStep]) -> None:
        now_ns = time.monotonic_ns()
        for step in steps:
            if step.error is not None:
                raise RuntimeError(f"{step.request_id}: {step.error.message}")
            timeline = self.timelines[step.request_id]
            timeline.token_ns += [now_ns] * len(step.events)
            timeline.token_ids += [event.token_id for event in step.events]
            logprobs = [event.logprob for event in step.events if event.logprob is not None]
            timeline.top_logprobs += [{top.token_id: top.logprob for top in found.top} for found in logprobs]
            timeline.cached_tokens = step.usage.cached_tokens
            timeline.is_done = step.finished
