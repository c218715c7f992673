"""Coverage-guided fuzzing of every parser with atheris (``pip install '.[fuzz]'``); not a part of the test suite.

    python -m tests.fuzz.fuzz_parsers --seconds 30            every target for 30 s each, and a table at the end
    python -m tests.fuzz.fuzz_parsers gguf [libFuzzer flags]  one target, until it fails or is stopped

Each run is bounded to 1 GiB of memory and 5 s an input. Exit code 0: nothing found.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

MEMORY_MIB: Final = 1024
INPUT_S: Final = 5


def fuzz_one(target: str, flags: list[str]) -> None:
    """Fuzz one target in this process. Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["snapshots", "guests", "worker.build"]):
        from tests.fuzz.parser_targets import TARGETS
    from tests.fuzz.seeds import good_inputs, greedy_inputs

    corpus = Path(tempfile.mkdtemp(prefix=f"gp-corpus-{target}-"))
    for number, data in enumerate([*good_inputs()[target], *greedy_inputs()[target]]):
        (corpus / f"seed-{number}").write_bytes(data)
    words = corpus.with_suffix(".dict")
    words.write_text("\n".join(_dictionary(good_inputs()[target])) + "\n")
    limits = [f"-rss_limit_mb={MEMORY_MIB}", f"-timeout={INPUT_S}", "-max_len=65536", f"-dict={words}"]
    atheris.Setup([sys.argv[0], *limits, *flags, str(corpus)], TARGETS[target])
    atheris.Fuzz()


def _dictionary(inputs: list[bytes]) -> list[str]:
    """Words of good inputs in libFuzzer's notation: it does not see into parsers written in C, as that of JSON is."""
    words = {word for data in inputs for word in re.findall(rb'"[\w.]{2,40}":?|[A-Za-z_]{3,20}|[\[{:,}\]]', data)}
    return ['"' + "".join(f"\\x{byte:02x}" for byte in word) + '"' for word in sorted(words)[:500]]


def fuzz_all(seconds: int) -> int:
    """Fuzz every target in a process of its own; number of targets with findings."""
    with tempfile.TemporaryDirectory(prefix="gp-fuzz-") as folder:
        return _fuzz_all(seconds, {**os.environ, "TMPDIR": folder})


def _fuzz_all(seconds: int, env: dict[str, str]) -> int:
    from tests.fuzz.parser_targets import TARGETS

    num_inputs = num_failed = 0
    for target in TARGETS:
        command = [sys.executable, "-m", "tests.fuzz.fuzz_parsers", target, f"-max_total_time={seconds}"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env)
        runs = re.search(r"Done (\d+) runs in (\d+) second", done.stderr)
        coverage = re.findall(r"cov: (\d+)", done.stderr)
        num_inputs += int(runs.group(1)) if runs else 0
        print(
            f"{target:24} {int(runs.group(1)) if runs else 0:10,} inputs  cov {coverage[-1] if coverage else '?':>5}  "
            f"{'nothing found' if done.returncode == 0 else 'FAILED'}",
            flush=True,
        )
        if done.returncode != 0:
            num_failed += 1
            print(done.stderr[-3000:], flush=True)
    print(f"{'all':24} {num_inputs:10,} inputs in {seconds * len(TARGETS) / 60:.1f} minutes")
    return num_failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?")
    parser.add_argument("--seconds", type=int, default=30, help="for each target, when all are fuzzed")
    arguments, flags = parser.parse_known_args()
    if arguments.target is None:
        return fuzz_all(arguments.seconds)
    fuzz_one(arguments.target, flags)
    return 0


if __name__ == "__main__":
    sys.exit(main())
