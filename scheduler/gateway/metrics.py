"""Prometheus metrics of the gateway: its own counts and times, and the fleet's numbers from the scheduler's report.

prometheus_client is imported on first use (65 ms of CPU), which the gateway brings about in a thread while it starts
(:meth:`GatewayMetrics.ensure_ready`). Label values come from fixed sets and from the names of existing models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from scheduler.contract.messages import GpuReport, StatusReport, Trace
from scheduler.contract.telemetry import Metric
from scheduler.gateway.batch_sums import UNKNOWN_MODEL, BatchSums
from scheduler.gateway.traces import COLD_START_NAMES, compute_ttft_ms

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

#: Seconds; fit 1 ms (a hot dispatch) to 30 s (a model read from a slow disk).
PHASE_BUCKETS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
DELIVERY_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
#: Monotonic clocks of different hosts do not compare; a delivery time beyond this says so and is dropped.
MAX_DELIVERY_S: Final = 60.0


class GatewayMetrics:
    """One registry and its metrics. Event loop only."""

    def __init__(self) -> None:
        self._instruments: _Instruments | None = None
        self._delivery_counts = [0] * (len(DELIVERY_BUCKETS_S) + 1)  # the last one: above all bounds
        self._delivery_sum_s = 0.0

    def ensure_ready(self) -> _Instruments:
        """The instruments, made on first use."""
        if self._instruments is None:
            self._instruments = _Instruments()
        return self._instruments

    def on_request(self, model: str | None, endpoint: str, status: int) -> None:
        """A request was answered. ``model`` None: it named none that exists."""
        self.ensure_ready().requests.labels(model or UNKNOWN_MODEL, endpoint, str(status)).inc()

    def on_in_flight(self, model: str, change: int) -> None:
        """A request for ``model`` began (+1) or ended (-1)."""
        self.ensure_ready().in_flight.labels(model).inc(change)

    def on_recovery(self) -> None:
        """A request that the queue's server had lost was looked for."""
        self.ensure_ready().recoveries.inc()

    def on_refused_key(self, reason: str) -> None:
        """A request was refused for its key, or for having none."""
        self.ensure_ready().refused_keys.labels(reason).inc()

    def on_batch_line(self, model: str | None, *, ok: bool) -> None:
        """A line of a batch was answered, well or not. ``model`` None: it named none that exists."""
        self.ensure_ready().batch_answers_total.labels(model or UNKNOWN_MODEL, "completed" if ok else "failed").inc()

    def on_delivery(self, sampled_mono_ns: list[int], written_mono_ns: int) -> None:
        """The tokens of steps were written to a client's socket; ``sampled_mono_ns``: when each step had sampled."""
        for instant_mono_ns in sampled_mono_ns:
            seconds = (written_mono_ns - instant_mono_ns) / 1e9
            if 0 <= seconds <= MAX_DELIVERY_S:
                # Once a token: the library's histogram, with its locks, would cost four times as much.
                self._delivery_counts[bisect_left(DELIVERY_BUCKETS_S, seconds)] += 1
                self._delivery_sum_s += seconds

    def on_trace(self, trace: Trace, *, prompt_tokens: int, completion_tokens: int) -> None:
        """A request ended well."""
        made = self.ensure_ready()
        tier = COLD_START_NAMES[trace.cold_tier]
        if trace.cold_tier is not None:
            made.cold_starts.labels(trace.model, tier).inc()
            for phase, milliseconds in trace.phases_ms.items():
                made.phases.labels(phase).observe(milliseconds / 1e3)
        if ttft_ms := compute_ttft_ms(trace):
            made.ttft.labels(trace.model, tier).observe(ttft_ms / 1e3)
        made.tokens.labels(trace.model, "prompt").inc(prompt_tokens)
        made.tokens.labels(trace.model, "completion").inc(completion_tokens)

    def render(
        self, status: StatusReport | None, security_counts: dict[str, int], batches: BatchSums | None = None
    ) -> tuple[bytes, str]:
        """The exposition text and its content type, with the fleet's gauges set from ``status`` and ``batches``."""
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        made = self.ensure_ready()
        made.set_fleet(status)
        made.set_batches(batches)
        made.security_counts = security_counts
        made.delivery = (tuple(accumulate(self._delivery_counts)), self._delivery_sum_s)
        return generate_latest(made.registry), CONTENT_TYPE_LATEST


class _Instruments:
    """The prometheus_client objects; made once a :class:`GatewayMetrics`."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        registry = CollectorRegistry()
        self.registry: CollectorRegistry = registry

        def counter(metric: Metric, text: str, *labels: str) -> Counter:
            return Counter(metric.value, text, labels, registry=registry)

        def gauge(metric: Metric, text: str, *labels: str) -> Gauge:
            return Gauge(metric.value, text, labels, registry=registry)

        def histogram(metric: Metric, text: str, *labels: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(metric.value, text, labels, registry=registry, buckets=buckets)

        self.requests = counter(Metric.REQUESTS_TOTAL, "Requests answered.", "model", "endpoint", "status")
        self.cold_starts = counter(Metric.COLD_STARTS_TOTAL, "Requests that woke a model.", "model", "tier")
        self.tokens = counter(Metric.TOKENS_TOTAL, "Tokens of finished requests.", "model", "kind")
        self.phases = histogram(Metric.PHASE_SECONDS, "Phases of cold starts.", "phase", buckets=PHASE_BUCKETS_S)
        self.ttft = histogram(
            Metric.TTFT_SECONDS, "Accepted to first content byte.", "model", "tier", buckets=PHASE_BUCKETS_S
        )
        self.delivery: tuple[tuple[int, ...], float] = ((0,) * (len(DELIVERY_BUCKETS_S) + 1), 0.0)
        self.recoveries = counter(Metric.RECOVERIES_TOTAL, "Requests that the queue's server had lost.")
        self.refused_keys = counter(Metric.REFUSED_KEYS_TOTAL, "Requests without a key that counts.", "reason")
        self.in_flight = gauge(Metric.IN_FLIGHT, "Requests this gateway holds.", "model")
        self.queue_depth = gauge(Metric.QUEUE_DEPTH, "Requests queued or running.", "model")
        self.swept = gauge(Metric.SWEPT_TOTAL, "What the sweeper found and dealt with, since this leader.", "kind")
        self.deaths = gauge(Metric.DEATHS, "Workers of a model that died one after the other.", "model")
        self.workers = gauge(Metric.WORKERS, "Workers by slot state.", "model", "state")
        self.sealed_bytes = gauge(Metric.SEALED_BYTES, "Verified snapshot bytes in host memory.", "model")
        self.kv_bytes = gauge(Metric.KV_BYTES, "KV memory of running workers, by what it holds.", "model", "kind")
        self.prefix_tokens = gauge(
            Metric.PREFIX_TOKENS, "Prompt tokens of running workers, and how many were cached.", "model", "kind"
        )
        self.gpu_bytes = gauge(Metric.GPU_BYTES, "Device memory as the driver counts it.", "node", "gpu", "kind")
        self.gpu_errors = gauge(Metric.GPU_ERRORS, "What the driver told of a GPU's errors.", "node", "gpu", "kind")
        self.batch_answers_total = counter(
            Metric.BATCH_ANSWERS_TOTAL, "Lines of batches that this gateway answered.", "model", "outcome"
        )
        self.batches = gauge(Metric.BATCHES, "Batches under way.", "status")
        self.batch_lines = gauge(Metric.BATCH_LINES, "Lines of batches under way.", "model", "state")
        self.batch_oldest_age = gauge(Metric.BATCH_OLDEST_AGE, "Age of the oldest batch under way.", "status")
        self.security_counts: dict[str, int] = {}
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily | HistogramMetricFamily]:
        """What is counted elsewhere: tokens' delivery times, and the counter that agents keep in Redis.

        prometheus_client calls this at each scrape.
        """
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
        from prometheus_client.utils import floatToGoString

        text = "Token sampled to written to the client."
        counts, sum_s = self.delivery
        bounds = [*map(floatToGoString, DELIVERY_BUCKETS_S), "+Inf"]
        buckets = list(zip(bounds, counts, strict=True))
        yield HistogramMetricFamily(Metric.TOKEN_DELIVERY_SECONDS.value, text, buckets=buckets, sum_value=sum_s)
        family = CounterMetricFamily(Metric.SECURITY_EVENTS_TOTAL.value, "Refused snapshots.", labels=["kind"])
        for kind, count in self.security_counts.items():
            family.add_metric([kind], count)
        yield family

    def set_fleet(self, status: StatusReport | None) -> None:
        """Replace the fleet's gauges; a model or worker that is gone leaves no series behind."""
        fleet = (self.queue_depth, self.deaths, self.workers, self.sealed_bytes, self.swept)
        for gauge in (*fleet, self.kv_bytes, self.prefix_tokens, self.gpu_bytes, self.gpu_errors):
            gauge.clear()
        if status is None:
            return
        for model in status.models:
            self.queue_depth.labels(model.name).set(model.queued)
            self.deaths.labels(model.name).set(model.deaths)
            self.sealed_bytes.labels(model.name).set(model.sealed_bytes)
        for kind, count in status.swept.items():
            self.swept.labels(kind).set(count)
        for worker in status.workers:
            self.workers.labels(worker.model, worker.state.value).inc()
            self.kv_bytes.labels(worker.model, "used").inc(worker.kv_used_bytes)
            self.kv_bytes.labels(worker.model, "cached").inc(worker.kv_cached_bytes)
            self.kv_bytes.labels(worker.model, "budget").inc(worker.kv_budget_bytes)
            self.prefix_tokens.labels(worker.model, "prompt").inc(worker.prompt_tokens)
            self.prefix_tokens.labels(worker.model, "cached").inc(worker.cached_tokens)
        for node in status.nodes:
            for gpu in node.gpus:
                self._set_gpu(node.node_id, gpu)

    def _set_gpu(self, node_id: str, gpu: GpuReport) -> None:
        sizes = {"total": gpu.total_bytes, "free": gpu.free_bytes, "spares": gpu.spare_bytes}
        for kind, num_bytes in sizes.items():
            self.gpu_bytes.labels(node_id, gpu.label, kind).set(num_bytes)
        errors = {"fault": int(bool(gpu.fault)), "uncorrected_ecc": gpu.uncorrected_ecc, "xid": len(gpu.xids)}
        for kind, count in errors.items():
            self.gpu_errors.labels(node_id, gpu.label, kind).set(count)

    def set_batches(self, sums: BatchSums | None) -> None:
        """Replace the gauges of batches; None: they are not known now."""
        for gauge in (self.batches, self.batch_lines, self.batch_oldest_age):
            gauge.clear()
        if sums is None:
            return
        for status, count in sums.batches.items():
            self.batches.labels(status).set(count)
        for (model, state), count in sums.lines.items():
            self.batch_lines.labels(model, state).set(count)
        for status, age_s in sums.oldest_s.items():
            self.batch_oldest_age.labels(status).set(age_s)
