"""Keeps out of a zygote what libraries import for uses that a worker has not: every page here is in every fork.

Call :func:`leave_out_unused` before anything that imports structlog or redis. It saves 14 MB of a zygote, a quarter of
its start, and page tables in each fork.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, Final

#: structlog prints tracebacks in colours with it where it is installed, and without it where it is not.
_UNUSED: Final = "rich"
#: redis imports it, and with it the bindings of OpenSSL, for logins with tokens of identity providers.
_RARELY_USED: Final = "jwt"


def leave_out_unused() -> None:
    """Make ``import rich`` fail, and ``import jwt`` wait for the first use of what is in it. Idempotent."""
    sys.modules.setdefault(_UNUSED, None)  # type: ignore[arg-type]  # None is documented: such an import fails
    if _RARELY_USED not in sys.modules:
        sys.modules[_RARELY_USED] = _loaded_on_use(_RARELY_USED)


def _loaded_on_use(name: str) -> ModuleType:
    """A module that becomes ``name`` at the first use. Not :class:`importlib.util.LazyLoader`'s: that one loads as
    soon as an import statement looks at its ``__spec__``."""

    def load(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    stand_in = ModuleType(name)
    stand_in.__dict__["__getattr__"] = load
    return stand_in
