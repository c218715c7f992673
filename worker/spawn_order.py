"""What an agent, its zygote and a new worker tell each other over the zygote's socket.

======================= ========= ==================================================================
message                 direction meaning
======================= ========= ==================================================================
:class:`ZygoteReady`    to agent  everything is imported and frozen; forks may be ordered
:class:`ForkWorker`     to zygote fork one worker; carries the descriptors of SpawnedFds
:class:`WorkerForked`   to agent  the worker runs
:class:`ForkRefused`    to agent  no process was made, and why
:class:`SignalWorker`   to zygote send a signal to a worker that the zygote has not reaped
:class:`PrepareModel`   to zygote restore a snapshot as far as all its workers have in common; likewise
:class:`ModelPrepared`  to agent  done: its workers inherit it
:class:`PrepareFailed`  to agent  it cannot be prepared; its workers restore it themselves
:class:`ForgetPrepared` to zygote the snapshot is not held any more: unmap it
:class:`ForkSpare`      to zygote fork a spare; carries its end of a channel to the agent, see below
:class:`WorkerExited`   to agent  the worker ended and was reaped
:class:`SpareReady`     to agent  (spare's channel) the device is warm
:class:`SpareRefused`   to agent  (spare's channel) it cannot be warmed, and why; the spare ends
:class:`TakeOrder`      to spare  (spare's channel) be this worker; carries the descriptors of SpawnedFds
======================= ========= ==================================================================

Signals go through the zygote because it alone reaps: a process id that it still knows cannot have been reused.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Final

import msgspec

from scheduler.contract.states import ParkPolicy, Tier

NUM_SPAWN_FDS: Final = range(2, 7)  # weights, guest, and what else the snapshot has for a worker
NO_FD: Final = -1
PARK_SIGNAL: Final = signal.SIGUSR1  # to a worker that is ready: leave the device once nothing runs
UNPARK_SIGNAL: Final = signal.SIGUSR2  # come back
EXIT_REPORTED: Final = 3  # exit code of a worker that could not start and has reported why


class SpawnOrder(msgspec.Struct, frozen=True):
    """All that a forked worker needs to know.

    ``manifest`` holds the encoded manifest that the agent verified; the worker does not check it again (and has no
    key to do so). ``marks`` are the instants of the wake so far; ``cold_tier`` is the coldest one the wake touched.
    """

    worker_id: str
    node_id: str
    model: str
    snapshot_id: str
    redis_url: str
    manifest: bytes
    backend: str
    num_threads: int
    max_running: int  # sequences at once
    kv_budget_bytes: int
    drain_grace_s: float
    cold_tier: Tier
    marks: dict[str, int] = {}
    draft_tokens: int = 0  # guessed ahead in each sequence; 0: none
    park_after_s: float = 0.0  # idle time after which a backend that can gives its device memory back; 0: never
    device: str = ""  # UUID of the one GPU that the worker may see; empty: as the environment says
    park: ParkPolicy = ParkPolicy.DROP  # what leaves the device then
    release_address: str = ""  # of who takes processes off their devices; empty: nobody here


def choose_device(uuid: str) -> None:
    """Let this process see that one GPU only, by the variable that the driver reads when it is loaded; empty: any.

    Requires: nothing of CUDA is loaded. A UUID means the same GPU whatever order the driver counts in.
    """
    if uuid:
        os.environ["CUDA_VISIBLE_DEVICES"] = uuid


class SpawnedFds:
    """Sealed, verified memory files, owned by the worker, in the order of the manifest's ``worker_roles``."""

    __slots__ = ("all",)

    def __init__(self, weights_fd: int, guest_fd: int, *further_fds: int) -> None:
        self.all: Final = (weights_fd, guest_fd, *further_fds)

    @property
    def weights_fd(self) -> int:
        return self.all[0]

    @property
    def guest_fd(self) -> int:
        return self.all[1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpawnedFds) and other.all == self.all

    def __hash__(self) -> int:
        return hash(self.all)

    def duplicate(self) -> SpawnedFds:
        """Copies, which the caller closes.

        Raises:
            OSError: no descriptor is left; none was taken.
        """
        copies: list[int] = []
        try:
            for fd in self.all:
                copies.append(os.dup(fd))
        except OSError:
            for fd in copies:
                os.close(fd)
            raise
        return SpawnedFds(*copies)

    def close(self) -> None:
        """Close all of them, once."""
        for fd in self.all:
            os.close(fd)

    def find(self, role: str, roles: Sequence[str]) -> int:
        """The descriptor of ``role``, where ``roles`` are the manifest's ``worker_roles``; NO_FD: there is none."""
        return dict(zip(roles, self.all, strict=False)).get(role, NO_FD)


class ZygoteReady(msgspec.Struct, frozen=True, tag="ready"):
    """First message of a zygote."""

    pid: int
    num_modules: int
    resident_bytes: int


class ForkWorker(msgspec.Struct, frozen=True, tag="fork"):
    """Fork a worker for ``order``; its file descriptors travel with the message."""

    order: SpawnOrder


class SignalWorker(msgspec.Struct, frozen=True, tag="signal"):
    """Send ``signal_number`` to a worker; nothing happens if it has ended."""

    worker_id: str
    signal_number: int


class PrepareModel(msgspec.Struct, frozen=True, tag="prepare"):
    """Restore the snapshot of ``manifest`` (encoded, verified) as far as every worker would do the same."""

    snapshot_id: str
    manifest: bytes
    backend: str
    num_threads: int


class ForgetPrepared(msgspec.Struct, frozen=True, tag="forget"):
    """Let go of a prepared snapshot; nothing happens if it is not prepared."""

    snapshot_id: str


class ModelPrepared(msgspec.Struct, frozen=True, tag="prepared"):
    """Answer to :class:`PrepareModel`. ``elapsed_ms`` is time that the zygote could not fork in, in short pieces."""

    snapshot_id: str
    elapsed_ms: float


class PrepareFailed(msgspec.Struct, frozen=True, tag="prepare_failed"):
    """Answer to :class:`PrepareModel` when it was in vain."""

    snapshot_id: str
    reason: str


class WorkerForked(msgspec.Struct, frozen=True, tag="forked"):
    """Answer to :class:`ForkWorker`."""

    worker_id: str
    pid: int


class ForkRefused(msgspec.Struct, frozen=True, tag="refused"):
    """Answer to :class:`ForkWorker` when no process could be made."""

    worker_id: str
    reason: str


class WorkerExited(msgspec.Struct, frozen=True, tag="exited"):
    """A worker was reaped. ``wait_status`` is that of ``waitpid``."""

    worker_id: str
    pid: int
    wait_status: int

    @property
    def exit_code(self) -> int:
        """Exit status, or minus the number of the signal that ended it."""
        return os.waitstatus_to_exitcode(self.wait_status)


class ForkSpare(msgspec.Struct, frozen=True, tag="fork_spare"):
    """Fork a process that warms ``backend`` on ``device`` (a GPU's UUID; empty: any) and waits. Answered as
    :class:`ForkWorker`; signals and its end name it ``spare_id``, whatever becomes of it."""

    spare_id: str
    device: str
    backend: str
    num_threads: int


class SpareReady(msgspec.Struct, frozen=True, tag="spare_ready"):
    """A spare is warm."""

    elapsed_ms: float


class SpareRefused(msgspec.Struct, frozen=True, tag="spare_refused"):
    """A spare could not be warmed."""

    reason: str


class TakeOrder(msgspec.Struct, frozen=True, tag="take"):
    """A spare is to be the worker of ``order``."""

    order: SpawnOrder


ToZygote = ForkWorker | ForkSpare | SignalWorker | PrepareModel | ForgetPrepared
FromZygote = ZygoteReady | WorkerForked | ForkRefused | WorkerExited | ModelPrepared | PrepareFailed
