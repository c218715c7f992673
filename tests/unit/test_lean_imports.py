"""What a zygote leaves out, and that what is left out for later comes when it is used."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from worker.lean_imports import leave_out_unused
leave_out_unused()
leave_out_unused()
import structlog, redis.asyncio
assert sys.modules["rich"] is None and "rich.console" not in sys.modules
assert "jwt.api_jwt" not in sys.modules and "cryptography.hazmat" not in sys.modules
import jwt
assert jwt.decode.__name__ == "decode"
assert "jwt.api_jwt" in sys.modules
try:
    jwt.no_such_thing
except AttributeError:
    print("as it should be")
"""


def test_unused_libraries_stay_out_and_rare_ones_come_when_used() -> None:
    """structlog and redis load without rich and without PyJWT; PyJWT works as soon as something of it is used."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "as it should be", done.stderr
