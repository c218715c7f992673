"""Names that builder and restore agree on."""

from __future__ import annotations

from typing import Final

#: The scales [N] of an int8 matrix ``X`` [N, K] are stored as the tensor ``X`` + this.
SCALE_SUFFIX: Final = "_scale"
