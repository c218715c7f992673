"""Starts a zygote process. Imports next to nothing: an agent does this before its own imports, which take as long."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

#: Command line of a zygote; the number of its channel's descriptor is appended.
ZYGOTE_COMMAND: Final = (sys.executable, "-m", "worker", "zygote")
#: Variables that hold a key: the agent's alone. Workers run guests, and neither verify nor call anybody.
KEY_VARIABLES: Final = frozenset({"GLOWPLUG_SNAPSHOT_KEY", "GLOWPLUG_API_KEY"})


class ZygoteProcess(NamedTuple):
    """A zygote that was started, ready or not. It ends when ``channel`` is closed."""

    process: subprocess.Popen[bytes]
    channel: socket.socket  # non-blocking


def start_zygote_process(command: Sequence[str] = ZYGOTE_COMMAND) -> ZygoteProcess:
    """Start a zygote (1 ms). Not by asyncio's subprocess: uvloop's lets inheritable descriptors through.

    It gets its own session: Ctrl-C in a terminal reaches the agent alone, which then drains the workers. No key that
    was given as a variable is passed on.

    Raises:
        OSError: no descriptor or no process is to be had.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        with theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if name not in KEY_VARIABLES},
            )
    except OSError:
        ours.close()
        raise
    return ZygoteProcess(process, ours)
