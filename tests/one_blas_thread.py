"""Import before NumPy: its products use one thread in the process of the tests.

OpenBLAS' second thread spins after every product, so with anything else on two cores it costs more than it gives
(a float32 reference run beside four busy processes: 82 s with it, 17 s without). It reads the variable when NumPy is
loaded; processes that tests start decide by themselves, so it does not stay.
"""

from __future__ import annotations

import os

VARIABLE = "OPENBLAS_NUM_THREADS"

_before = os.environ.get(VARIABLE)
os.environ[VARIABLE] = _before or "1"
import numpy as np  # noqa: E402, F401

if _before is None:
    del os.environ[VARIABLE]
