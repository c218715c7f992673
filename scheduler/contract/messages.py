"""Every message that crosses a process border, as msgspec structs.

All times named ``*_mono_ns`` are CLOCK_MONOTONIC nanoseconds of the host; ``*_at_s`` are wall-clock seconds.
Token logs and pub/sub carry *frames*: one kind byte, then MessagePack (see :mod:`scheduler.contract.codec`).
In one file, though over 400 lines: it is read as the list of all that travels.
"""

from __future__ import annotations

import msgspec

from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.states import FinishReason, GrammarKind, ModelAct, ParkPolicy, Priority, SlotState, Task, Tier
from scheduler.contract.trace_context import TraceContext


class OutputGrammar(msgspec.Struct, frozen=True):
    """What a completion must match. ``source`` is JSON text of a schema, a regular expression, or a Lark grammar."""

    kind: GrammarKind
    source: str


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen. ``seed`` is always set (the gateway draws one if the client gave none)."""

    seed: int
    max_tokens: int  # completion tokens; already cut to what fits the context where the prompt is known
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    num_top_logprobs: int | None = None  # None: no log-probabilities; 0: the chosen token's only
    min_tokens: int = 0
    ignore_eos: bool = False
    grammar: OutputGrammar | None = None


class EmbeddingInputs(msgspec.Struct, frozen=True, omit_defaults=True):
    """What to embed: texts, or token ids taken as they are. ``dimensions``: numbers of each vector, 0 for all."""

    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int = 0


class GenerateRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One accepted request, as enqueued. ``prompt`` is rendered text, or token ids taken as they are; where
    ``embedding`` is set, that is what is asked for, and prompt and sampling mean nothing."""

    request_id: str
    model: str
    gateway_id: str
    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    num_choices: int = 1
    priority: Priority = Priority.INTERACTIVE
    parse_special: bool = True  # text such as <|im_end|> in the prompt becomes its special token
    add_special: bool = True  # the tokenizer's own BOS around the text; False for a chat, whose template writes it
    user: str | None = None
    tenant: str = ""  # whose request it is; keys and values are shared within a tenant only
    accepted_at_s: float = 0.0
    marks: dict[str, int] = {}  # Mark -> mono ns, filled so far
    embedding: EmbeddingInputs | None = None
    text_only: bool = False  # for the tokenizer alone: text becomes token ids, token ids become text
    generation: int = 0  # how often it was queued anew because the server had lost it; its runs fence off older ones
    trace_context: TraceContext | None = None  # the span under which its run is seen
    clock_id: str = ""  # of the clock that ``marks`` were read from; empty: the reader's own


class RequestRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """A streamed call as any gateway can go on with it: who may, and what its events are made of.

    ``part_ids`` are its requests, one for each prompt. No prompt is kept, unless the client asked for its echo.
    """

    request_id: str
    tenant: str
    model: str
    snapshot_id: str
    endpoint: str
    gateway_id: str
    part_ids: tuple[str, ...]
    num_choices: int
    include_usage: bool
    created_at_s: int
    echoes: tuple[str, ...] = ()
    tool_style: str = ""  # how the model writes calls, where the answer may hold some
    tool_names: tuple[str, ...] = ()  # of which functions


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One candidate of a position; ``token_bytes`` may be part of a UTF-8 character."""

    token_id: int
    token_bytes: bytes
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The chosen token of a position with the best candidates, natural logarithm."""

    token_id: int
    token_bytes: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


class TokenEvent(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one choice. ``text`` may be empty while bytes are held back."""

    choice: int
    token_id: int  # -1: no new token (text flushed at the end)
    text: str
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    stop_sequence: str | None = None  # the string of ``SamplingParams.stop`` that ended the choice, if one did


class StepFrame(msgspec.Struct, frozen=True, array_like=True):
    """All events of one request in one engine step."""

    events: tuple[TokenEvent, ...]
    sampled_mono_ns: int = 0


class VectorFrame(msgspec.Struct, frozen=True, array_like=True):
    """Numbers ``offset`` on of the vector of input ``index``, float32 little-endian."""

    index: int
    num_tokens: int  # of the input
    num_values: int  # of the whole vector
    offset: int
    values: bytes

    @property
    def is_last(self) -> bool:
        """Whether the vector is complete with this frame."""
        return self.offset + len(self.values) // 4 == self.num_values


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a finished request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class TerminalFrame(msgspec.Struct, frozen=True, omit_defaults=True):
    """The one last frame of a request: usage, or the error that ended it, and the marks of its way."""

    usage: Usage = Usage()
    error: ErrorInfo | None = None
    marks: dict[str, int] = {}
    worker_id: str = ""
    cold_tier: Tier | None = None  # None: met a hot worker
    snapshot_id: str = ""
    clock_id: str = ""  # of the clock that the marks were read from; empty: the reader's own
    #: Where the request's marks are of another clock, in place of ``cold_tier``: the tier it met if, by the reader's
    #: clock, it came before the worker was ready. The marks of the wake are among ``marks`` then.
    wake_tier: Tier | None = None


class ModelCard(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the gateway and scheduler know of a model without touching its snapshot. Written by node agents.

    ``refused`` is set when the snapshot failed verification: no worker is started, requests get that error.
    """

    name: str
    snapshot_id: str = ""
    created_at_s: float = 0.0
    architecture: str = ""
    weight_format: str = ""  # "bf16", "int8", ...
    context_length: int = 0  # tokens
    vocab_size: int = 0  # tokens
    max_token_bytes: int = 0  # the longest token's text; bounds a prompt's token count from below
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    weights_bytes: int = 0
    worker_bytes: int = 0  # private memory to reserve for one worker, KV included
    refused: ErrorInfo | None = None
    task: Task = Task.GENERATE
    vector_size: int = 0  # numbers in a vector of a model that embeds


# --- scheduler inbox (stream) ------------------------------------------------------------------------------


class Demand(msgspec.Struct, frozen=True, tag="demand"):
    """A request was enqueued for ``model``."""

    model: str
    request_id: str
    sent_mono_ns: int


class WorkerChanged(msgspec.Struct, frozen=True, tag="worker", omit_defaults=True):
    """A worker's slot changed state, or its process ended (state cold or failed, ``exited`` true)."""

    node_id: str
    worker_id: str
    model: str
    state: SlotState
    exited: bool = False
    error: ErrorInfo | None = None
    had_requests: bool = False  # it died while it ran some: perhaps of one of them, so it is no failed wake


class ModelsChanged(msgspec.Struct, frozen=True, tag="models"):
    """A node's set of models changed; read the cards again."""

    node_id: str


class ModelOrder(msgspec.Struct, frozen=True, tag="order"):
    """An operator wants something done to ``model`` once."""

    model: str
    act: ModelAct


class PolicyChanged(msgspec.Struct, frozen=True, tag="policy"):
    """An operator pinned models or drained nodes (read both again), or asks for the configuration to be read again."""

    reload_config: bool = False


InboxMessage = Demand | WorkerChanged | ModelsChanged | ModelOrder | PolicyChanged


# --- commands to a node agent (stream) ---------------------------------------------------------------------


class SpawnWorker(msgspec.Struct, frozen=True, tag="spawn", omit_defaults=True):
    """Start one worker process for ``model``. ``fencing_token`` is the leader's; older ones are ignored."""

    worker_id: str
    model: str
    fencing_token: int
    max_running: int  # sequences at once
    kv_budget_bytes: int
    marks: dict[str, int] = {}
    park_after_s: float = 0.0  # idle time after which it gives its device memory back, if it can; 0: never
    device: str = ""  # UUID of the GPU that it is for; empty: a CPU, or the node's only GPU
    park: ParkPolicy = ParkPolicy.DROP


class DrainWorker(msgspec.Struct, frozen=True, tag="drain"):
    """Stop taking requests, finish what runs within ``grace_s`` seconds, exit."""

    worker_id: str
    fencing_token: int
    grace_s: float


class ParkWorker(msgspec.Struct, frozen=True, tag="park"):
    """Have a worker that is ready return its device memory once nothing runs (T4 to T3), or come back."""

    worker_id: str
    fencing_token: int
    is_parked: bool = True


class ForgetModel(msgspec.Struct, frozen=True, tag="forget"):
    """Drop the sealed bytes of ``model`` from host memory (T2 to T1); refused while a worker maps them."""

    model: str
    fencing_token: int


class PrefetchModel(msgspec.Struct, frozen=True, tag="prefetch"):
    """Verify ``model`` into sealed memory (T1 to T2), without a process."""

    model: str
    fencing_token: int


AgentCommand = SpawnWorker | DrainWorker | ParkWorker | ForgetModel | PrefetchModel


# --- published reports (advisory, with a timestamp) --------------------------------------------------------


class GpuReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """One GPU of a node, or one MIG instance, as its driver counts: free bytes are those that no process has.

    ``fault`` says why no worker is to go there, and the remedy; empty: nothing known.
    """

    index: int  # as nvidia-smi counts
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    architecture: int = 0  # compute capability, 90 for 9.0
    driver: str = ""
    uncorrected_ecc: int = 0  # errors of memory since the driver was loaded, or the GPU was reset
    xids: tuple[int, ...] = ()  # the driver's critical errors since the agent started, the latest last
    fault: str = ""
    spare_workers: int = 0  # warm, of no model yet
    spare_bytes: int = 0  # device memory of these, as far as the driver tells
    worker_bytes: dict[str, int] = {}  # worker id -> device memory, likewise
    instance: int = -1  # number of the MIG instance on GPU ``index``; -1: the whole GPU

    @property
    def label(self) -> str:
        """Which one of its node: ``0``, or ``0:2`` for an instance."""
        return str(self.index) if self.instance < 0 else f"{self.index}:{self.instance}"


class NodeReport(msgspec.Struct, frozen=True):
    """A node agent's heartbeat."""

    node_id: str
    pid: int
    reported_at_s: float
    memory_total_bytes: int
    memory_available_bytes: int
    sealed_bytes: dict[str, int]  # model -> sealed bytes held
    zygote_pid: int = 0
    backend: str = "numkong"
    gpus: tuple[GpuReport, ...] = ()  # empty where there is none, or no driver library to ask


class WorkerReport(msgspec.Struct, frozen=True):
    """A worker's heartbeat, by the worker itself."""

    worker_id: str
    node_id: str
    model: str
    pid: int
    state: SlotState
    num_running: int
    num_waiting: int
    reported_at_s: float
    kv_used_bytes: int = 0
    kv_budget_bytes: int = 0
    private_bytes: int = 0
    tokens_generated: int = 0
    proportional_bytes: int = 0  # PSS: what it shares with other processes counts by its share; 0: not measured yet
    kv_cached_bytes: int = 0  # kept for prompts to come, within the budget; given up when running requests need it
    prompt_tokens: int = 0  # of admitted requests
    cached_tokens: int = 0  # of these, taken over from earlier requests instead of computed
    device: str = ""  # UUID of its GPU; empty: as its order said
    park: ParkPolicy = ParkPolicy.DROP  # what leaves the device when it is parked


class StageEvent(msgspec.Struct, frozen=True, array_like=True):
    """Progress of a wake, published for waiting clients. ``eta_ms``: to the first token, -1 if unknown."""

    model: str
    stage: str
    eta_ms: int = -1


class SecurityEvent(msgspec.Struct, frozen=True):
    """Something that looked like tampering, for people to read. The log has it too, at critical level."""

    at_s: float
    kind: str
    model: str
    node_id: str
    reason: str


class ModelStatus(msgspec.Struct, frozen=True):
    """One row of ``glowplug ps``."""

    name: str
    tier: Tier
    workers: int
    in_flight: int
    queued: int
    idle_for_s: float | None
    idle_timeout_s: float
    sealed_bytes: int
    worker_bytes: int
    state: str = ""  # worker slot states, comma separated; "refused" for a refused snapshot
    error: str | None = None
    proportional_bytes: int = 0  # PSS of all workers: the weights that they share count once
    awake_s: float = 0.0  # worker-seconds since the scheduler knows the model
    known_s: float = 0.0  # how long that is
    pinned: bool = False  # never scaled to zero
    deaths: int = 0  # of its workers in a row, while they ran requests; from the third on, the next one waits


class StatusReport(msgspec.Struct, frozen=True):
    """What the scheduler leader publishes for ``ps`` and the gateway."""

    published_at_s: float
    leader: str
    models: tuple[ModelStatus, ...]
    nodes: tuple[NodeReport, ...] = ()
    workers: tuple[WorkerReport, ...] = ()
    swept: dict[str, int] = {}  # kind -> what the sweeper found and dealt with, since this leader started
    drained_nodes: tuple[str, ...] = ()  # by an operator: no new workers there


class Trace(msgspec.Struct, frozen=True):
    """The phases of one finished request. ``marks`` are mono ns; ``phases_ms`` derived from them."""

    request_id: str
    model: str
    cold_tier: Tier | None
    worker_id: str
    accepted_at_s: float
    marks: dict[str, int]
    phases_ms: dict[str, float]
    total_ms: float
    error: ErrorCode | None = None  # why it did not end well
    trace_id: str = ""  # of the distributed trace that it is part of
    clock_error_ms: float | None = None  # another host's marks were moved to the gateway's clock, to within this
