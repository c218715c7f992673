"""``python -m worker.benchmarks.gpu_suspend``: a warm worker taken off its GPU by the driver and back (T3 released).

A child opens the device and holds memory; this process asks the driver to suspend and to resume it, and reads the
device's free memory beside it. Prints JSON; exits with 77 where the driver has no such calls.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any, Final

from worker.backends.cuda.checkpoint import DriverCheckpoint, find_checkpoint
from worker.backends.cuda.device import DeviceError

_NO_CALLS: Final = 77  # what gpu-check takes for "lacking"
_CHILD: Final = """
import sys
from worker.backends.cuda.opening import open_device
device = open_device(0)
place = device.allocate(int(sys.argv[1]))
stream, event = device.make_stream(), device.make_event()
device.fill(place, 7, stream)
device.record(event, stream)
device.synchronise(event)
print("ready", flush=True)
for line in sys.stdin:  # after each resumption: does it still work?
    device.fill(place, 9, stream)
    device.record(event, stream)
    device.synchronise(event)
    print("works", flush=True)
"""


def measure_rounds(checkpoint: DriverCheckpoint, child: subprocess.Popen[str], num_rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of each suspension and resumption, and whether the child worked after it."""
    assert child.stdin is not None
    assert child.stdout is not None
    rounds = []
    for _ in range(num_rounds):
        begin_s = time.perf_counter()
        checkpoint.suspend(child.pid)
        suspended_s = time.perf_counter()
        state = checkpoint.read_state(child.pid)
        resume_s = time.perf_counter()
        checkpoint.resume(child.pid)
        resumed_s = time.perf_counter()
        child.stdin.write("go\n")
        child.stdin.flush()
        works = child.stdout.readline().strip() == "works"
        rounds.append(
            {
                "suspend_ms": round((suspended_s - begin_s) * 1e3, 1),
                "resume_ms": round((resumed_s - resume_s) * 1e3, 1),
                "state": state.name,
                "works_after": works,
            }
        )
    return rounds


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=2 << 30)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    checkpoint = find_checkpoint()
    if checkpoint is None:
        print(
            json.dumps({"available": False, "reason": "no driver, or one without cuCheckpointProcess* (570 has them)"})
        )
        return _NO_CALLS
    command = [sys.executable, "-c", _CHILD, str(options.bytes)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            print(json.dumps({"available": True, "error": "the child could not open the device"}))
            return 1
        rounds = measure_rounds(checkpoint, child, options.rounds)
    except DeviceError as error:
        print(json.dumps({"available": True, "error": str(error)}))
        return 1
    finally:
        child.kill()
        child.wait()
    print(json.dumps({"available": True, "held_bytes": options.bytes, "rounds": rounds}))
    return 0 if all(one["works_after"] for one in rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
