"""What a process gives up before it touches untrusted WebAssembly.

Three layers, each enough to stop a different mistake, none needing a privilege:

* resource limits: CPU seconds, private memory (RLIMIT_DATA: Wasmtime reserves terabytes of address space that it never
  touches, so RLIMIT_AS is of no use), size of what it writes, number of descriptors, no core files;
* Landlock: no path can be opened, no TCP port connected or bound, no process outside signalled;
* seccomp: no new program, no new process (threads are fine), no socket, no tracing, no signal to others, nothing that
  changes the machine, even for root.

Landlock and seccomp are used where the kernel has them; :func:`confine` says which layers hold.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from dataclasses import dataclass
from typing import Final

MAX_DESCRIPTORS: Final = 16  # standard streams, memory images of a module, one to spare for each

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_SECCOMP: Final = 22
PR_SET_NO_NEW_PRIVS: Final = 38
SECCOMP_MODE_FILTER: Final = 2

# linux/landlock.h; the system calls have the same numbers on every architecture.
SYS_LANDLOCK_CREATE_RULESET: Final = 444
SYS_LANDLOCK_RESTRICT_SELF: Final = 446
LANDLOCK_CREATE_RULESET_VERSION: Final = 1
#: ABI version -> all file system rights that it knows (linux/landlock.h, LANDLOCK_ACCESS_FS_*).
LANDLOCK_FS_RIGHTS: Final = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
LANDLOCK_FS_RIGHTS_SINCE_5: Final = (1 << 16) - 1
LANDLOCK_NET_RIGHTS_SINCE_4: Final = 0b11  # bind and connect TCP
LANDLOCK_SCOPES_SINCE_6: Final = 0b11  # abstract unix sockets, signals

# linux/filter.h, linux/seccomp.h, linux/audit.h
BPF_LOAD_WORD: Final = 0x20
BPF_JUMP_EQUAL: Final = 0x15
BPF_JUMP_AT_LEAST: Final = 0x35
BPF_JUMP_ANY_BIT: Final = 0x45
BPF_RETURN: Final = 0x06
SECCOMP_ALLOW: Final = 0x7FFF_0000
SECCOMP_ERRNO: Final = 0x0005_0000
SECCOMP_KILL_PROCESS: Final = 0x8000_0000
OFFSET_NUMBER: Final = 0  # of struct seccomp_data
OFFSET_ARCHITECTURE: Final = 4
OFFSET_FIRST_ARGUMENT: Final = 16  # low half, little-endian
OFFSET_THIRD_ARGUMENT: Final = 32
CLONE_THREAD: Final = 0x0001_0000
X32_BIT: Final = 0x4000_0000  # x86-64's third entry numbers its system calls from here


@dataclass(frozen=True, slots=True)
class _Architecture:
    """Numbers of one architecture. ``denied`` are system calls that fail with EPERM."""

    audit: int
    clone: int
    clone3: int
    prlimit64: int
    tgkill: int
    denied: dict[str, int]


ARCHITECTURES: Final = {
    "x86_64": _Architecture(
        audit=0xC000_003E,
        clone=56,
        clone3=435,
        prlimit64=302,
        tgkill=234,
        denied={
            "execve": 59, "execveat": 322, "fork": 57, "vfork": 58, "socket": 41, "socketpair": 53, "connect": 42,
            "bind": 49, "ptrace": 101, "kill": 62, "process_vm_readv": 310, "process_vm_writev": 311,
            "pidfd_getfd": 438, "pidfd_open": 434, "io_uring_setup": 425, "bpf": 321, "perf_event_open": 298,
            "userfaultfd": 323, "keyctl": 250, "add_key": 248, "request_key": 249, "mount": 165, "unshare": 272,
            "setns": 308, "open_by_handle_at": 304, "shmget": 29, "msgget": 68, "setrlimit": 160, "tkill": 200,
            "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424, "umount2": 166,
            "pivot_root": 155, "chroot": 161, "init_module": 175, "finit_module": 313, "delete_module": 176,
            "kexec_load": 246, "kexec_file_load": 320, "reboot": 169, "swapon": 167, "swapoff": 168, "acct": 163,
            "settimeofday": 164, "clock_settime": 227, "adjtimex": 159, "clock_adjtime": 305, "sethostname": 170,
            "setdomainname": 171, "iopl": 172, "ioperm": 173, "syslog": 103, "quotactl": 179,
        },
    ),
    "aarch64": _Architecture(
        audit=0xC000_00B7,
        clone=220,
        clone3=435,
        prlimit64=261,
        tgkill=131,
        denied={
            "execve": 221, "execveat": 281, "socket": 198, "socketpair": 199, "connect": 203, "bind": 200,
            "ptrace": 117, "kill": 129, "process_vm_readv": 270, "process_vm_writev": 271, "pidfd_getfd": 438,
            "pidfd_open": 434, "io_uring_setup": 425, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282,
            "keyctl": 219, "add_key": 217, "request_key": 218, "mount": 40, "unshare": 97, "setns": 268,
            "open_by_handle_at": 265, "shmget": 194, "msgget": 186, "setrlimit": 164, "tkill": 130,
            "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "pidfd_send_signal": 424, "umount2": 39,
            "pivot_root": 41, "chroot": 51, "init_module": 105, "finit_module": 273, "delete_module": 106,
            "kexec_load": 104, "kexec_file_load": 294, "reboot": 142, "swapon": 224, "swapoff": 225, "acct": 89,
            "settimeofday": 170, "clock_settime": 112, "adjtimex": 171, "clock_adjtime": 266, "sethostname": 161,
            "setdomainname": 162, "syslog": 116, "quotactl": 60,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class WorkLimits:
    """What a confined process may take. ``wall_s`` is the parent's to enforce, the rest is the kernel's."""

    wall_s: float
    cpu_s: int
    data_bytes: int = 4 << 30  # a guest of 512 MiB exists several times over while it is baked and compiled
    output_bytes: int = 1 << 30


def confine(limits: WorkLimits) -> tuple[str, ...]:
    """Give it all up, for good and for every thread to come. Call once, single-threaded, after all imports.

    Returns the layers that hold, ``("rlimits", "landlock", "seccomp")`` where the kernel has all of them.

    Raises:
        OSError: a resource limit cannot be set (it exceeds the hard limit that this process inherited).
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody of the same user attaches to it
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, limits.cpu_s, limits.cpu_s + 2)  # SIGXCPU, and SIGKILL for one that ignores it
    _limit(resource.RLIMIT_DATA, limits.data_bytes)
    _limit(resource.RLIMIT_FSIZE, limits.output_bytes)
    _limit(resource.RLIMIT_NOFILE, MAX_DESCRIPTORS)
    layers = ["rlimits"]
    if _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        if _restrict_paths():
            layers.append("landlock")
        if _filter_system_calls():
            layers.append("seccomp")
    return tuple(layers)


def _limit(which: int, soft: int, hard: int | None = None) -> None:
    inherited = resource.getrlimit(which)[1]
    hard = soft if hard is None else hard
    if inherited != resource.RLIM_INFINITY:
        soft, hard = min(soft, inherited), min(hard, inherited)
    resource.setrlimit(which, (soft, hard))


def _restrict_paths() -> bool:
    """A Landlock ruleset that handles every right and grants none. Descriptors that are open stay usable."""
    version = _libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_CREATE_RULESET_VERSION)
    if version < 1:
        return False
    rights = struct.pack(
        "<QQQ",
        LANDLOCK_FS_RIGHTS.get(version, LANDLOCK_FS_RIGHTS_SINCE_5),
        LANDLOCK_NET_RIGHTS_SINCE_4 if version >= 4 else 0,
        LANDLOCK_SCOPES_SINCE_6 if version >= 6 else 0,
    )
    used = 24 if version >= 6 else 16 if version >= 4 else 8  # older kernels refuse a longer structure
    ruleset = _libc.syscall(SYS_LANDLOCK_CREATE_RULESET, rights[:used], ctypes.c_size_t(used), 0)
    if ruleset < 0:
        return False
    # The descriptor stays open: it grants nothing, and the process lives for one task.
    return bool(_libc.syscall(SYS_LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), 0) == 0)


class _Filter(ctypes.Structure):  # struct sock_fprog
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _filter_system_calls() -> bool:
    architecture = ARCHITECTURES.get(platform.machine())
    if architecture is None:
        return False
    code = b"".join(_filter_program(architecture))
    program = _Filter(len(code) // 8, code)
    return bool(_libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0)


def _filter_program(architecture: _Architecture) -> list[bytes]:
    """Classic BPF, one instruction an item: u16 code, u8 jump if true, u8 jump if false, u32 operand."""

    def step(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, operand)

    refuse = step(BPF_RETURN, SECCOMP_ERRNO | errno.EPERM)
    program = [
        step(BPF_LOAD_WORD, OFFSET_ARCHITECTURE),
        step(BPF_JUMP_EQUAL, architecture.audit, if_true=1),
        step(BPF_RETURN, SECCOMP_KILL_PROCESS),  # the 32-bit entry has other numbers
        step(BPF_LOAD_WORD, OFFSET_NUMBER),
        step(BPF_JUMP_AT_LEAST, X32_BIT, if_false=1),
        step(BPF_RETURN, SECCOMP_KILL_PROCESS),
        # clone3 hides its flags behind a pointer: ENOSYS makes the C library use clone.
        step(BPF_JUMP_EQUAL, architecture.clone3, if_false=1),
        step(BPF_RETURN, SECCOMP_ERRNO | errno.ENOSYS),
    ]
    for number in architecture.denied.values():
        program += [step(BPF_JUMP_EQUAL, number, if_false=1), refuse]
    return [
        *program,
        # Limits may be read, and not set: root could raise them again.
        step(BPF_JUMP_EQUAL, architecture.prlimit64, if_false=6),
        step(BPF_LOAD_WORD, OFFSET_THIRD_ARGUMENT),
        step(BPF_JUMP_EQUAL, 0, if_false=2),
        step(BPF_LOAD_WORD, OFFSET_THIRD_ARGUMENT + 4),
        step(BPF_JUMP_EQUAL, 0, if_true=1),
        refuse,
        step(BPF_RETURN, SECCOMP_ALLOW),
        # To itself only: how a process aborts.
        step(BPF_JUMP_EQUAL, architecture.tgkill, if_false=4),
        step(BPF_LOAD_WORD, OFFSET_FIRST_ARGUMENT),
        step(BPF_JUMP_EQUAL, os.getpid(), if_true=1),
        refuse,
        step(BPF_RETURN, SECCOMP_ALLOW),
        step(BPF_JUMP_EQUAL, architecture.clone, if_false=3),
        step(BPF_LOAD_WORD, OFFSET_FIRST_ARGUMENT),
        step(BPF_JUMP_ANY_BIT, CLONE_THREAD, if_true=1),
        refuse,
        step(BPF_RETURN, SECCOMP_ALLOW),
    ]
