"""GPUs of a status report, for people: whose memory is whose, spares, faults."""

from __future__ import annotations

from typing import Any

MIB = 1024 * 1024


def gpu_table(status: dict[str, Any]) -> Any:
    """Every GPU of every node as a rich table; None: no node has one."""
    gpus = [(node["node_id"], gpu) for node in status["nodes"] for gpu in node["gpus"]]
    if not gpus:
        return None
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("GPU", "NAME", "USED", "TOTAL", "HELD BY", "SPARES", "STATE"):
        table.add_column(column, justify="right" if column in ("USED", "TOTAL") else "left")
    models = {worker["worker_id"]: worker["model"] for worker in status["workers"]}
    for node_id, gpu in gpus:
        num_spares, spare_bytes = gpu.get("spare_workers", 0), gpu.get("spare_bytes", 0)
        table.add_row(
            f"{node_id}:{label_of(gpu)}",
            gpu["name"],
            _mib(gpu["total_bytes"] - gpu["free_bytes"]),
            _mib(gpu["total_bytes"]),
            _describe_holders(gpu, models),
            f"{num_spares} ({_mib(spare_bytes)})" if spare_bytes else str(num_spares),
            describe_state(gpu),
        )
    return table


def label_of(gpu: dict[str, Any]) -> str:
    """Which one of its node: ``0``, or ``0:2`` for a MIG instance."""
    instance = gpu.get("instance", -1)
    return str(gpu["index"]) if instance < 0 else f"{gpu['index']}:{instance}"


def describe_state(gpu: dict[str, Any]) -> str:
    """``ok``, or what its driver has told of errors."""
    if gpu.get("fault"):
        return f"FAULT: {gpu['fault']}"
    told = [f"{gpu['uncorrected_ecc']} uncorrected memory errors"] if gpu.get("uncorrected_ecc") else []
    told += [f"Xid {', '.join(str(xid) for xid in gpu['xids'])}"] if gpu.get("xids") else []
    return "; ".join(told) or "ok"


def _describe_holders(gpu: dict[str, Any], models: dict[str, str]) -> str:
    held: dict[str, int] = {}
    for worker_id, num_bytes in gpu.get("worker_bytes", {}).items():
        model = models.get(worker_id, worker_id)
        held[model] = held.get(model, 0) + num_bytes
    placed = {model: _mib(num_bytes) for model, num_bytes in held.items()}
    return ", ".join(f"{model} {size}" for model, size in sorted(placed.items())) or "-"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.0f} MiB"
