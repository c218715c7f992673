"""``python -m loadtest.first_serve STATE_DIR MODEL``: the first serve of a model that this host has not verified (T1).

A server is started for each sample, so that nothing is sealed; then the files of its store are dropped from the page
cache (``--warm``: not), and one token is asked for. ``--against DIR`` pairs every sample with one of another checkout
of this repository, in turn, and gives the ratios. The state folder must have been built before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from loadtest.processes import Server
from loadtest.streaming_client import chat_body, get_json, post_stream


def drop_page_cache(folder: Path) -> None:
    """Have the kernel forget the files below ``folder``, so that the next read comes from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def measure_once(state_dir: Path, model: str, *, is_warm: bool) -> dict[str, Any]:
    """Milliseconds to the first content byte, and of each phase.

    Raises:
        RuntimeError: an error came instead of content.
    """
    with tempfile.TemporaryDirectory() as folder, Server(state_dir, log=Path(folder) / "log") as server:
        server.wait_ready()
        server.wait_listed(model)
        if not is_warm:
            drop_page_cache(state_dir / "store")
        answer = post_stream(server.url, chat_body(model, max_tokens=1))
        if answer.error or not answer.content_at_ms:
            raise RuntimeError(f"request failed: status {answer.status} {answer.error[:300]}")
        trace = get_json(server.url, f"/admin/traces/{answer.request_id}")
        return {"first_content_ms": answer.first_content_ms, "phases_ms": trace["phases_ms"]}


def measure_in(checkout: Path, arguments: list[str]) -> dict[str, Any]:
    """:func:`measure_once` with the code of another checkout: this module runs in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--once"]
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    result = subprocess.run(command, env=env, cwd=checkout, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def summarise(name: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, extremes, and the median of each phase."""
    values = sorted(sample["first_content_ms"] for sample in samples)
    phases = {phase: [sample["phases_ms"].get(phase, 0.0) for sample in samples] for phase in samples[0]["phases_ms"]}
    return {
        "checkout": name,
        "num_samples": len(values),
        "median_ms": round(statistics.median(values), 1),
        "min_ms": round(values[0], 1),
        "max_ms": round(values[-1], 1),
        "phase_medians_ms": {phase: round(statistics.median(found), 1) for phase, found in phases.items()},
    }


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.first_serve", description=__doc__)
    parser.add_argument("state_dir", type=Path)
    parser.add_argument("model")
    parser.add_argument("--warm", action="store_true", help="leave the page cache alone")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--against", type=Path, metavar="DIR", help="pair with another checkout")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure_once(options.state_dir, options.model, is_warm=options.warm)))
        return 0
    passed_on = [str(options.state_dir.resolve()), options.model, *(["--warm"] if options.warm else [])]
    here = Path(__file__).resolve().parent.parent
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for number in range(options.samples):
        pair = [(here, ours), *([(options.against.resolve(), theirs)] if options.against else [])]
        for checkout, samples in pair if number % 2 else reversed(pair):
            samples.append(measure_in(checkout, passed_on))
    results: dict[str, Any] = {"page_cache": "warm" if options.warm else "cold", "rows": [summarise("here", ours)]}
    if theirs:
        results["rows"].append(summarise("against", theirs))
        ratios = [our["first_content_ms"] / their["first_content_ms"] for our, their in zip(ours, theirs, strict=True)]
        results["ratio_median"] = round(statistics.median(ratios), 3)
    print(json.dumps(results, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
