"""States and tiers that several processes name."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Tier(StrEnum):
    """Where a model's weights are; the coldest part of a wake names the tier of its cold start."""

    REMOTE = "T0"  # object store
    DISK = "T1"  # local disk, not in sealed memory
    HOST_RAM = "T2"  # sealed memory file, no worker process
    RELEASED = "T3r"  # parked, and the driver keeps what else the process had on the device in host memory
    PARKED = "T3"  # worker alive, weights in host memory, their device memory returned
    HOT = "T4"  # worker alive and serving


class ParkPolicy(StrEnum):
    """What of a parked worker leaves its device."""

    KEEP = "keep"  # weights; KV blocks stay, and with them what later prompts could take over
    DROP = "drop"  # weights and KV blocks
    RELEASE = "release"  # everything, the context too, where the driver can (T3r); else as DROP


class ModelAct(StrEnum):
    """What an operator can ask for, once, of a model."""

    WAKE = "wake"  # a worker, without a request
    PARK = "park"  # device memory returned, processes kept
    UNLOAD = "unload"  # workers drained, sealed bytes forgotten
    PREFETCH = "prefetch"  # sealed bytes, without a worker


class Task(StrEnum):
    """What a model does."""

    GENERATE = "generate"
    EMBED = "embed"


class GrammarKind(StrEnum):
    """How the text that a completion must match is written down."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


class SlotState(StrEnum):
    """A worker's slot. One writer: the worker's slot loop.

    ========= ========== =========================================
    from      to         when
    ========= ========== =========================================
    cold      restoring  the process starts with its spawn order
    restoring ready      model mapped, guest restored, plan bound
    restoring failed     anything was refused or went wrong
    parked    released   at once, by policy, where the driver takes the whole process off the device
    ready     draining   drain order, SIGTERM, or idle limit
    ready     parked     idle for ``park_after_s``, or asked to, on a backend that can
    parked    ready      a request was claimed, or a wake asked for; the weights are on their way back
    released  parked     fetched back by the driver; else as from parked
    parked    failed     somebody else has the device memory and keeps it
    parked    draining   as from ready
    draining  cold       no request in flight; the process exits
    ========= ========== =========================================
    """

    COLD = "cold"
    RESTORING = "restoring"
    READY = "ready"
    PARKED = "parked"
    RELEASED = "released"
    DRAINING = "draining"
    FAILED = "failed"


#: A worker in one of these claims requests.
CLAIMING_STATES: Final = frozenset({SlotState.READY, SlotState.PARKED, SlotState.RELEASED})
#: Of these, the ones whose model has left its device.
AWAY_STATES: Final = frozenset({SlotState.PARKED, SlotState.RELEASED})


class FinishReason(StrEnum):
    """Why a choice ended; OpenAI's vocabulary."""

    STOP = "stop"
    LENGTH = "length"


class Priority(StrEnum):
    """Class of a request: interactive ones are claimed before batch ones."""

    INTERACTIVE = "interactive"
    BATCH = "batch"
