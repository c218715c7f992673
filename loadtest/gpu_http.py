"""``python -m loadtest.gpu_http CHECKPOINT FOLDER``: the ladder of a GPU node through HTTP, as JSON lines.

Builds a snapshot of the checkpoint in FOLDER and serves it there; each line is one tier: first content byte of a
streamed answer, its phases, and the tier that the answer's trace names. T3: parked. T3r: the whole process
released by the driver, where it can, else as T3. T2: weights sealed, no worker, with and without a spare one. T1: a
fresh server and nothing in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loadtest.first_serve import drop_page_cache
from loadtest.processes import Server, glowplug_command, wait_until
from loadtest.streaming_client import chat_body, get_json, post_stream

MODEL: Final = "gpu-check"
_PARK_AFTER_S: Final = 0.5
_IDLE_TIMEOUT_S: Final = 1.0
_WORKER_START_S: Final = 120.0
_SPARE_S: Final = 30.0
_DISK_BYTES: Final = 16 << 20
_DISK_READERS: Final = 4

Figures = dict[str, Any]

BIAS: dict[str, float] = {}  # of every request; see choose_bias


def build(checkpoint: Path, state_dir: Path, quantize: str | None) -> float:
    """Seconds that ``glowplug build`` took.

    Raises:
        RuntimeError: it failed; its output is in the message.
    """
    begin_s = time.perf_counter()
    options = ["--quantize", quantize, *(["--calibrate", "none"] if quantize == "int8" else [])] if quantize else []
    command = [*glowplug_command(), "build", str(checkpoint), "--name", MODEL, "--state-dir", str(state_dir), "--dev"]
    done = subprocess.run([*command, "--no-prime", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"build failed: {(done.stdout + done.stderr)[-600:]}")
    return time.perf_counter() - begin_s


def write_config(path: Path, *, parks: bool, park: str = "drop") -> Path:
    """A configuration in which a worker parks soon and stays, or ends soon."""
    policy: Figures = {
        "park": park,
        "park_after_s": _PARK_AFTER_S if parks else 0.0,
        "idle_timeout_s": 600.0 if parks else _IDLE_TIMEOUT_S,
    }
    path.write_text(json.dumps({"defaults": policy}))  # JSON is YAML
    return path


def choose_bias(checkpoint: Path) -> dict[str, float]:
    """A bias that makes a letter of every token: most of a made-up vocabulary has no text that could be sent."""
    vocab = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    letter = next(text for text in ("a", "e", *vocab) if text in vocab and text.isalpha())
    return {str(vocab[letter]): 100.0}


def ask(server: Server) -> Figures:
    """One token: milliseconds to its first content byte, the tier that served it, its phases.

    Raises:
        RuntimeError: an error came instead of content.
    """
    answer = post_stream(server.url, chat_body(MODEL, max_tokens=1, ignore_eos=True, logit_bias=BIAS))
    if answer.error or not answer.content_at_ms:
        raise RuntimeError(f"request failed: status {answer.status} {answer.error[:400]}")
    trace = get_json(server.url, f"/admin/traces/{answer.request_id}")
    return {
        "first_content_ms": round(answer.first_content_ms, 2),
        "tier": trace.get("cold_tier") or "hot",
        "phases_ms": trace.get("phases_ms", {}),
    }


@dataclass(frozen=True, slots=True)
class Rounds:
    """``count`` rounds, fewer (but one) where ``deadline_s`` of the monotonic clock comes first."""

    count: int
    deadline_s: float

    def __iter__(self) -> Iterator[int]:
        for index in range(self.count):
            if index and time.monotonic() > self.deadline_s:
                return
            yield index


def measure(name: str, rounds: Rounds, once: Callable[[], Figures]) -> Figures:
    """``once`` in each of ``rounds``; medians of the whole and of each phase. Ends at the first error, and tells it."""
    samples: list[Figures] = []
    error = ""
    try:
        for _ in rounds:
            samples.append(once())
    except (RuntimeError, TimeoutError, OSError) as failure:
        error = str(failure)
    found: Figures = {"tier": name, "num_samples": len(samples)}
    if samples:
        values = sorted(sample["first_content_ms"] for sample in samples)
        phases = {phase for sample in samples for phase in sample["phases_ms"]}
        found |= {
            "median_ms": round(statistics.median(values), 2),
            "min_ms": values[0],
            "max_ms": values[-1],
            "tiers_seen": sorted({str(sample["tier"]) for sample in samples}),
            "phase_medians_ms": {
                phase: round(statistics.median(sample["phases_ms"].get(phase, 0.0) for sample in samples), 2)
                for phase in sorted(phases)
            },
        }
    return found | ({"error": error[-800:]} if error else {})


def measure_parked(state_dir: Path, folder: Path, rounds: Rounds, *, park: str = "drop") -> Figures:
    """T3, or T3r (``park`` "release"): the model parks after each answer; VRAM meanwhile as the driver counts."""
    config = write_config(folder / "parks.yaml", parks=True, park=park)
    with Server(state_dir, "--config", str(config), log=folder / "parked.log") as server:
        prepare(server)

        def once() -> Figures:
            wait_until(lambda: is_parked(server), within_s=_WORKER_START_S, what="the model parked", every_s=0.05)
            return ask(server)

        found = measure("T3r" if park == "release" else "T3", rounds, once)
        if "error" not in found:
            wait_until(lambda: is_parked(server), within_s=_WORKER_START_S, what="the model parked", every_s=0.05)
        return found | {"device_mib": read_device_mib()}


def measure_sealed(state_dir: Path, folder: Path, rounds: Rounds, *, spares: int) -> Figures:
    """T2: the worker has ended, the weights are sealed; with ``spares`` warm workers of no model, where they exist."""
    name = "T2 with a spare" if spares else "T2"
    config = write_config(folder / "ends.yaml", parks=False)
    before = os.environ.get("GLOWPLUG_SPARE_WORKERS")
    os.environ["GLOWPLUG_SPARE_WORKERS"] = str(spares)
    try:
        with Server(state_dir, "--config", str(config), log=folder / f"sealed-{spares}.log") as server:
            prepare(server)

            def once() -> Figures:
                server.wait_asleep(MODEL, within_s=_WORKER_START_S)
                if spares:
                    wait_until(
                        lambda: num_spares(server) >= spares, within_s=_SPARE_S, what="a spare worker", every_s=0.05
                    )
                return ask(server)

            server.wait_asleep(MODEL, within_s=_WORKER_START_S)
            idle_mib = read_device_mib()
            return measure(name, rounds, once) | {"device_mib": idle_mib}
    finally:
        os.environ.pop("GLOWPLUG_SPARE_WORKERS")
        if before is not None:
            os.environ["GLOWPLUG_SPARE_WORKERS"] = before


def measure_first(state_dir: Path, folder: Path, rounds: Rounds) -> Figures:
    """T1: a fresh server, files dropped from the page cache."""

    def once() -> Figures:
        config = write_config(folder / "first.yaml", parks=False)
        with Server(state_dir, "--config", str(config), log=folder / "first.log") as server:
            server.wait_ready()
            server.wait_listed(MODEL)
            drop_page_cache(state_dir / "store")
            return ask(server)

    found = measure("T1", rounds, once)
    blob = max((state_dir / "store" / "blobs").glob("*/*"), key=lambda path: path.stat().st_size)
    return found | {"weights_bytes": blob.stat().st_size, "disk_bytes_per_s": round(read_disk_rate(blob))}


def read_disk_rate(path: Path, most_bytes: int = 4 << 30) -> float:
    """Bytes a second that the disk gives of ``path``, past the page cache where it can be passed: the ceiling of T1."""
    drop_page_cache(path.parent)
    size = min(path.stat().st_size, most_bytes)
    begin_s = time.perf_counter()
    with ThreadPoolExecutor(_DISK_READERS) as pool:
        num_bytes = sum(pool.map(lambda start: _read_direct(path, start), range(0, size, _DISK_BYTES)))
    return num_bytes / (time.perf_counter() - begin_s)


def _read_direct(path: Path, start: int) -> int:
    for flags in (os.O_RDONLY | os.O_DIRECT, os.O_RDONLY):
        with contextlib.suppress(OSError), mmap.mmap(-1, _DISK_BYTES) as buffer:  # page-aligned, as O_DIRECT wants it
            fd = os.open(path, flags)
            try:
                return os.preadv(fd, [buffer], start)
            finally:
                os.close(fd)
    raise OSError(f"{path}: cannot be read at byte {start}")


def prepare(server: Server) -> None:
    """Wait until the model is there, and serve it once."""
    server.wait_ready()
    server.wait_listed(MODEL)
    ask(server)


def read_gpus(server: Server) -> list[Figures]:
    """What the nodes report of their GPUs."""
    nodes = get_json(server.url, "/admin/status").get("nodes", [])
    return [gpu for node in nodes for gpu in node.get("gpus", [])]


def num_spares(server: Server) -> int:
    """Warm workers of no model, as nodes report them."""
    return sum(int(gpu.get("spare_workers", 0)) for gpu in read_gpus(server))


def read_device_mib() -> int | None:
    """MiB of the first GPU in use, all processes, as the driver's own tool says; None: no such tool."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    first = done.stdout.strip().partition("\n")[0]
    return int(first) if first.isdecimal() else None


def is_parked(server: Server) -> bool:
    """Whether the model's worker says that it is parked, or released."""
    return server.model_status(MODEL).get("tier") in ("T3", "T3r")


def main() -> int:
    """Command line; 1 where a tier gave no figure."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.gpu_http", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantize", choices=["int8", "fp8", "int4"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiers", default="T3,T2s,T2,T1,T3r", help="comma separated; T2s: with a spare")
    parser.add_argument("--limit-s", type=float, default=600.0, help="no round begins after it, no tier either")
    options = parser.parse_args()
    # Stopped early, it unwinds: a server that it started would keep the GPU from whoever comes next.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.folder.mkdir(parents=True, exist_ok=True)
    deadline_s = time.monotonic() + options.limit_s
    os.environ["GLOWPLUG_BACKEND"] = "cuda"
    BIAS.update(choose_bias(options.checkpoint))
    state_dir = options.folder / "state"
    print(json.dumps({"build_s": round(build(options.checkpoint, state_dir, options.quantize), 1)}), flush=True)
    rounds = Rounds(options.rounds, deadline_s)
    tiers: dict[str, Callable[[Path], Figures]] = {
        "T3": lambda logs: measure_parked(state_dir, logs, rounds),
        "T3r": lambda logs: measure_parked(state_dir, logs, Rounds(min(options.rounds, 5), deadline_s), park="release"),
        "T2": lambda logs: measure_sealed(state_dir, logs, rounds, spares=0),
        "T2s": lambda logs: measure_sealed(state_dir, logs, rounds, spares=1),
        "T1": lambda logs: measure_first(state_dir, logs, Rounds(min(options.rounds, 3), deadline_s)),
    }
    failed = False
    for tier in options.tiers.split(","):
        if time.monotonic() > deadline_s:
            print(json.dumps({"tier": tier, "num_samples": 0, "error": "no time was left"}), flush=True)
            continue
        with tempfile.TemporaryDirectory(dir=options.folder) as logs:
            try:
                found = tiers[tier](Path(logs))
            except (RuntimeError, TimeoutError, OSError, ValueError, KeyError) as error:
                found = {"tier": tier, "error": f"{type(error).__name__}: {error}"[-800:]}
            if "error" in found:
                failed = True
                found["log_tail"] = "".join(path.read_text()[-1500:] for path in Path(logs).glob("*.log"))
        print(json.dumps(found), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
