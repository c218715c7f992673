"""What a confined process can no longer do, tried in a real one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

from guests.confinement import ARCHITECTURES, _filter_program

ATTEMPTS = """
import ctypes, json, os, resource, signal, socket, sys, threading
from guests.confinement import WorkLimits, confine
layers = confine(WorkLimits(wall_s=9.0, cpu_s=5, data_bytes=256 << 20, output_bytes=4096))
def outcome(action):
    try:
        action()
        return "done"
    except BaseException as error:
        return type(error).__name__
def run_thread():
    thread = threading.Thread(target=print, args=(), kwargs={"end": ""})
    thread.start(); thread.join()
def many_files():
    for _ in range(100): os.memfd_create("x")
memory = os.memfd_create("image")
print(json.dumps({
    "layers": layers,
    "read a file": outcome(lambda: open("/etc/passwd")),
    "write a file": outcome(lambda: open("/tmp/confined", "w")),
    "list a folder": outcome(lambda: os.listdir("/")),
    "own memory as a file": outcome(lambda: open("/proc/self/mem", "rb")),
    "socket": outcome(lambda: socket.socket()),
    "unix socket": outcome(lambda: socket.socketpair()),
    "fork": outcome(os.fork),
    "program": outcome(lambda: os.execv("/bin/true", ["true"])),
    "kill the parent": outcome(lambda: os.kill(os.getppid(), signal.SIGCONT)),
    "trace": "done" if ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0 else "refused",
    "600 MiB": outcome(lambda: bytearray(600 << 20)),
    "the 4097th byte of output": outcome(lambda: os.pwrite(memory, bytes(1), 4096)),
    "a hundred descriptors": outcome(many_files),
    "raise a limit": outcome(lambda: resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))),
    "lower a limit": outcome(lambda: resource.setrlimit(resource.RLIMIT_DATA, (1, 1))),
    "read a limit": outcome(lambda: resource.getrlimit(resource.RLIMIT_DATA)),
    "thread": outcome(run_thread),
    "100 MiB": outcome(lambda: bytearray(100 << 20)),
}))
sys.stdout.flush()
os._exit(0)
"""
REFUSED = {"PermissionError", "OSError", "MemoryError", "ValueError", "refused"}
#: Attempt -> the layer that refuses it; None: it is allowed.
LAYER_OF: dict[str, str | None] = {
    "read a file": "landlock",
    "write a file": "landlock",
    "list a folder": "landlock",
    "own memory as a file": "landlock",
    "socket": "seccomp",
    "unix socket": "seccomp",
    "fork": "seccomp",
    "program": "seccomp",
    "kill the parent": "seccomp",
    "trace": "seccomp",
    "600 MiB": "rlimits",
    "the 4097th byte of output": "rlimits",
    "a hundred descriptors": "rlimits",
    "raise a limit": "seccomp",  # for root, who else could
    "lower a limit": "seccomp",
    "read a limit": None,
    "thread": None,
    "100 MiB": None,
}


def test_threat_hostile_module_confined() -> None:
    """Files, sockets, processes, signals, memory and descriptors beyond the limits are refused; threads are not."""
    done = subprocess.run([sys.executable, "-c", ATTEMPTS], capture_output=True, text=True, timeout=60, check=True)
    outcomes = json.loads(done.stdout)
    print(outcomes)
    layers = set(outcomes.pop("layers"))
    assert "rlimits" in layers  # the other two are the kernel's to offer; what they refuse is asserted where they hold
    assert set(LAYER_OF) == set(outcomes)
    for what, layer in LAYER_OF.items():
        if layer is None:
            assert outcomes[what] == "done", what
        elif layer in layers:
            assert outcomes[what] in REFUSED, what


SIGNALS = """
import ctypes, errno, json, os, platform, signal, sys
from guests.confinement import PR_SET_NO_NEW_PRIVS, _filter_system_calls
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
applies = _filter_system_calls()
numbers = {
    "x86_64": {"kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297},
    "aarch64": {"kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240},
}[platform.machine()]
parent = os.getppid()
def send(name, *arguments):
    ctypes.set_errno(0)
    libc.syscall(numbers[name], *map(ctypes.c_long, arguments))
    return errno.errorcode.get(ctypes.get_errno(), "done")
info = ctypes.addressof(ctypes.create_string_buffer(128))
print(json.dumps({
    "applies": applies,
    "kill": send("kill", parent, signal.SIGCONT),
    "tkill": send("tkill", parent, signal.SIGCONT),
    "tgkill": send("tgkill", parent, parent, signal.SIGCONT),
    "rt_sigqueueinfo": send("rt_sigqueueinfo", parent, signal.SIGCONT, info),
    "rt_tgsigqueueinfo": send("rt_tgsigqueueinfo", parent, parent, signal.SIGCONT, info),
    "itself": send("tgkill", os.getpid(), os.getpid(), signal.SIGCONT),
}))
sys.stdout.flush()
os.abort()
"""


def test_no_system_call_signals_another_process() -> None:
    """By the filter alone, as kernels before Landlock's sixth version have no other layer for it; a process that aborts
    still ends by the signal that says so."""
    done = subprocess.run([sys.executable, "-c", SIGNALS], capture_output=True, text=True, timeout=60, check=False)
    outcomes = json.loads(done.stdout)
    if outcomes.pop("applies"):
        assert outcomes.pop("itself") == "done"
        assert outcomes == dict.fromkeys(outcomes, "EPERM")
    assert done.returncode == -signal.SIGABRT


DENIED = """
import ctypes, errno, json, platform
from guests.confinement import ARCHITECTURES, PR_SET_NO_NEW_PRIVS, _filter_system_calls
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
outcomes = {}
if _filter_system_calls():
    for name, number in ARCHITECTURES[platform.machine()].denied.items():
        ctypes.set_errno(0)
        libc.syscall(number, *[ctypes.c_long(0)] * 6)
        outcomes[name] = errno.errorcode.get(ctypes.get_errno(), "done")
print(json.dumps(outcomes))
"""


def test_what_is_denied_is_denied_to_root_too() -> None:
    """Every system call of the list, by its number; what changes the machine (modules, mounts, clocks, a restart) is
    among them: who builds in a container is often root."""
    done = subprocess.run([sys.executable, "-c", DENIED], capture_output=True, text=True, timeout=60, check=True)
    outcomes = json.loads(done.stdout)
    assert outcomes == dict.fromkeys(outcomes, "EPERM")
    for architecture in ARCHITECTURES.values():
        machine = {"init_module", "finit_module", "kexec_load", "reboot", "mount", "umount2", "chroot", "clock_settime"}
        assert machine <= architecture.denied.keys()


def test_the_filters_of_all_architectures_are_well_formed() -> None:
    """Eight bytes an instruction, jumps that stay inside, no system call denied twice."""
    for architecture in ARCHITECTURES.values():
        program = _filter_program(architecture)
        assert {len(instruction) for instruction in program} == {8}
        assert len(set(architecture.denied.values())) == len(architecture.denied)
        for position, instruction in enumerate(program):
            assert position + 1 + max(instruction[2], instruction[3]) < len(program) + (instruction[0] == 0x06)
