"""Every Redis key and channel. Nothing else in the project spells one."""

from __future__ import annotations

from typing import Final

PREFIX: Final = "gp:"

#: Lifetimes, seconds. Every key has one, or an owner named here.
REQUEST_TTL_S: Final = 3600  # queued job, fence, cancel flag
LOG_TTL_S: Final = 600  # token log after its last frame
TRACE_TTL_S: Final = 3600
NODE_TTL_S: Final = 10
STATUS_TTL_S: Final = 5
WORKER_TTL_S: Final = 5
RECORD_TTL_S: Final = REQUEST_TTL_S + LOG_TTL_S  # what a client needs to come back; from its end on as long as its log
GATEWAY_TTL_S: Final = 5
USAGE_TTL_S: Final = 40 * 86_400  # usage of one day
RESULT_TTL_S: Final = 60  # arq result kept, so that a repeated enqueue is refused

JOB_FUNCTION: Final = "generate"  # arq function name
MODELS: Final = PREFIX + "models"  # hash name -> ModelCard; owner: node agents
NODES: Final = PREFIX + "nodes"  # set of node ids; owner: node agents
WORKERS: Final = PREFIX + "workers"  # set of worker ids; owner: node agents
GATEWAYS: Final = PREFIX + "gateways"  # set of gateway ids; owner: gateways (in), sweeper (out)
INBOX: Final = PREFIX + "inbox"  # stream of InboxMessage; owner: scheduler leader (trimmed)
EVENTS: Final = PREFIX + "events"  # pub/sub: StageEvent
CONTROL: Final = PREFIX + "control"  # pub/sub: ReloadOrder
LEADER: Final = PREFIX + "leader"  # string: leader id, with TTL
LEADER_TOKEN: Final = PREFIX + "leader:token"  # counter: fencing tokens
STATUS: Final = PREFIX + "status"  # string: StatusReport; owner: scheduler leader
PINNED: Final = PREFIX + "pinned"  # set of models that an operator pinned; owner: gateways
DRAINED_NODES: Final = PREFIX + "drained"  # set of node ids that take no new workers; owner: gateways
TRACES: Final = PREFIX + "traces"  # list of request ids, newest first, trimmed
SECURITY_COUNTS: Final = PREFIX + "security"  # hash kind -> count; owner: node agents
SECURITY_RECENT: Final = PREFIX + "security:recent"  # list of SecurityEvent, newest first, trimmed; owner: node agents
SECURITY_RECENT_MAX_ENTRIES: Final = 50
KEYS_USED: Final = PREFIX + "keys:used"  # hash API key id -> wall-clock second; owner: gateways
LIMITS: Final = PREFIX + "limit"  # prefix of the rate limiter's windows, each with TTL
BATCHES: Final = PREFIX + "batches"  # hash batch id -> tenant, of those that have not ended; owner: gateways
BATCH_RUNS: Final = PREFIX + "batches:runs"  # counter: numbers of the runs of batches
BATCH_TTL_S: Final = 30 * 86_400  # a batch's record, as long as its files
INBOX_MAX_ENTRIES: Final = 10_000
TRACES_MAX_ENTRIES: Final = 10_000  # and so many traces: some 10 MiB

LISTENER_MARK: Final = "#"  # after the gateway's id in the value of a listener key

FIELD: Final = "m"  # the one field of our stream entries


def queue(model: str) -> str:
    """Sorted set of job ids, arq's layout; score is the claim order."""
    return f"{PREFIX}q:{model}"


def fair(model: str) -> str:
    """Hash beside a queue: virtual time of each class and the last tag of each tenant; gone with the queue."""
    return f"{PREFIX}q:{model}:fair"


def bell(model: str) -> str:
    """Stream of length 1 that wakes claiming workers."""
    return f"{PREFIX}q:{model}:bell"


def job(request_id: str) -> str:
    """Body of a queued or running job. This prefix and the next three are arq's, so that arq reads what we write."""
    return f"arq:job:{request_id}"


def in_progress(request_id: str) -> str:
    """Lease of a running job: the id of the worker that holds it, with TTL."""
    return f"arq:in-progress:{request_id}"


def retry(request_id: str) -> str:
    """How many runs of a job have started; arq's ``job_try``, our attempt number."""
    return f"arq:retry:{request_id}"


def result(request_id: str) -> str:
    """Digest of a finished job's body, kept for RESULT_TTL_S so that a repeated enqueue is recognised."""
    return f"arq:result:{request_id}"


def token_log(request_id: str) -> str:
    """List; element i is frame i."""
    return f"{PREFIX}log:{request_id}"


def fence(request_id: str) -> str:
    """Attempt number of the run that may write the token log."""
    return f"{PREFIX}fence:{request_id}"


def cancelled(request_id: str) -> str:
    """Set when the client went away; a run that begins later ends at once."""
    return f"{PREFIX}cancel:{request_id}"


def record(request_id: str) -> str:
    """RequestRecord of a streamed call, under its first request's id."""
    return f"{PREFIX}request:{request_id}"


def listener(request_id: str) -> str:
    """Id of the gateway that listens for the request's client: the one that took it, or the last that resumed it."""
    return f"{PREFIX}listener:{request_id}"


def crashes(request_id: str) -> str:
    """How many workers died while they ran the request."""
    return f"{PREFIX}crashes:{request_id}"


def gateway_alive(gateway_id: str) -> str:
    """Sign of life of a gateway, with TTL."""
    return f"{PREFIX}gateway:{gateway_id}"


def gateway_channel(gateway_id: str) -> str:
    """Pub/sub channel of one gateway process."""
    return f"{PREFIX}gw:{gateway_id}"


def control_channel(model: str) -> str:
    """Pub/sub channel to a model's workers: request ids to cancel."""
    return f"{PREFIX}ctl:{model}"


def node(node_id: str) -> str:
    """NodeReport, with TTL."""
    return f"{PREFIX}node:{node_id}"


def node_commands(node_id: str) -> str:
    """Stream of AgentCommand."""
    return f"{PREFIX}node:{node_id}:cmd"


def worker(worker_id: str) -> str:
    """WorkerReport, with TTL."""
    return f"{PREFIX}worker:{worker_id}"


def trace(request_id: str) -> str:
    """Trace, with TTL."""
    return f"{PREFIX}trace:{request_id}"


def usage(day: str) -> str:
    """Hash of one UTC day (YYYY-MM-DD): what each tenant, key and model used, with TTL."""
    return f"{PREFIX}usage:{day}"


def tenant_running(tenant: str) -> str:
    """Sorted set of a tenant's calls under way; score: when the lease of each ends. With TTL."""
    return f"{PREFIX}tenant:{tenant}:running"


def batch(batch_id: str) -> str:
    """BatchRecord, with TTL."""
    return f"{PREFIX}batch:{batch_id}"


def batch_lease(batch_id: str) -> str:
    """The gateway and the number of the run that may change a batch, with TTL."""
    return f"{PREFIX}batch:{batch_id}:lease"


def batch_cancelled(batch_id: str) -> str:
    """Wall-clock second at which a batch's end was asked for, with TTL."""
    return f"{PREFIX}batch:{batch_id}:cancel"


def reload_answers(order_id: str) -> str:
    """Hash of what processes made of an order to reload, with TTL."""
    return f"{PREFIX}reload:{order_id}"


def tenant_batches(tenant: str) -> str:
    """Sorted set of a tenant's batches; score: when each was created. With TTL."""
    return f"{PREFIX}tenant:{tenant}:batches"


#: Keys that a request, a process or a trace leaves behind: each must have a TTL.
TTL_PREFIXES: Final = (
    job(""),
    in_progress(""),
    retry(""),
    result(""),
    token_log(""),
    fence(""),
    cancelled(""),
    record(""),
    listener(""),
    gateway_alive(""),
    worker(""),
    trace(""),
    crashes(""),
    batch(""),
    reload_answers(""),
)
#: Keys that live as long as their owner, which is named beside each.
OWNED_KEYS: Final = frozenset(
    {
        MODELS,
        NODES,
        WORKERS,
        GATEWAYS,
        INBOX,
        LEADER,
        LEADER_TOKEN,
        STATUS,
        TRACES,
        SECURITY_COUNTS,
        KEYS_USED,
        BATCHES,
        BATCH_RUNS,
        PINNED,
        DRAINED_NODES,
    }
)
OWNED_PREFIXES: Final = (queue(""), node(""))
#: What the sweeper looks at; everything else in the database belongs to somebody else.
SWEPT_PREFIXES: Final = (PREFIX, "arq:")


def has_owner(key: str) -> bool:
    """Whether ``key`` may do without a TTL."""
    return key in OWNED_KEYS or key.startswith(OWNED_PREFIXES)
