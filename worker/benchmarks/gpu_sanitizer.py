"""``python -m worker.benchmarks.gpu_sanitizer``: warm-up's kernels on the GPU under ``compute-sanitizer``.

Warm-up launches every kernel of a decoder, of each stored format; exits with 77 where the tool is not installed.
"""

from __future__ import annotations

import sys
from typing import Final

from worker.backends.kernels.sanitizer import find_sanitizer, run_sanitizer

_TOOLS: Final = ("memcheck", "racecheck")
_LIMIT_S: Final = 45.0
_SCRIPT: Final = "from worker.backends.choice import make_backend; make_backend('cuda', 1).warm()"


def main() -> int:
    """0: clean; 1: something was found; 77: not installed."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer is not installed")
        return 77
    is_clean = True
    for tool in _TOOLS:
        try:
            verdict = run_sanitizer(sanitizer, tool, [sys.executable, "-c", _SCRIPT], limit_s=_LIMIT_S)
        except TimeoutError as error:
            print(error)
            is_clean = False
            continue
        if not verdict.is_clean:
            print(verdict.output[-4000:])
        print(f"{tool}: {'clean' if verdict.is_clean else f'{verdict.num_errors} errors'}")
        is_clean &= verdict.is_clean
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
