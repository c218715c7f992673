"""What people see of GPUs: `ps` and `top`, metrics, `doctor`. Reports and readings are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from scheduler import terminal_commands
from scheduler.contract.messages import GpuReport, NodeReport, StatusReport, WorkerReport
from scheduler.contract.states import SlotState
from scheduler.gateway.metrics import GatewayMetrics
from scheduler.gpu_table import gpu_table
from worker.diagnosis import host_checks, setup_checks
from worker.nvml import GpuReading

GIB = 1 << 30
HEALTHY = GpuReport(0, "GPU-a", "Stand-in", 24 * GIB, 20 * GIB, 90, "570", xids=(31,), spare_workers=1,
                    spare_bytes=512 << 20, worker_bytes={"w1": 2 * GIB, "w2": GIB})  # fmt: skip
BROKEN = GpuReport(1, "GPU-b", "Stand-in", 24 * GIB, 24 * GIB, uncorrected_ecc=2, fault="Xid 79, fallen off the bus")
INSTANCE = GpuReport(2, "MIG-c", "Stand-in MIG 1g.10gb", 10 * GIB, 10 * GIB, instance=3)
STATUS = StatusReport(
    0.0,
    "leader",
    (),
    (NodeReport("n1", 1, 0.0, GIB, GIB, {}, backend="cuda", gpus=(HEALTHY, BROKEN, INSTANCE)),),
    (WorkerReport("w1", "n1", "m", 1, SlotState.READY, 0, 0, 0.0, device="GPU-a"),),
)


def render(picture: Any) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115  # closed with the process
    console.print(picture)
    return console.export_text()


def test_ps_and_top_show_whose_device_memory_is_whose() -> None:
    """Used and total, by model, spares with theirs, and what is wrong; nothing where there is no GPU."""
    status = json.loads(msgspec.json.encode(STATUS))
    for text in (render(gpu_table(status)), render(terminal_commands._picture(status))):
        assert "4,096 MiB" in text
        assert "m 2,048 MiB, w2 1,024 MiB" in text
        assert "1 (512 MiB)" in text
        assert "Xid 31" in text
        assert "FAULT: Xid 79, fallen off the bus" in text
        assert "n1:2:3  Stand-in MIG 1g.10gb" in text
    assert gpu_table({"nodes": [{"node_id": "n", "gpus": []}], "workers": []}) is None


def test_metrics_of_gpus_come_and_go_with_the_report() -> None:
    """Bytes and errors by node and number; a node that is gone leaves no series."""
    metrics = GatewayMetrics()
    metrics.render(STATUS, {})

    def value(name: str, gpu: str, kind: str) -> float | None:
        labels = {"node": "n1", "gpu": gpu, "kind": kind}
        found: float | None = metrics.ensure_ready().registry.get_sample_value(name, labels)
        return found

    free, spares = (value("glowplug_gpu_bytes", "0", kind) for kind in ("free", "spares"))
    assert (free, spares) == (20 * GIB, 512 << 20)
    told = [value("glowplug_gpu_errors", "1", kind) for kind in ("fault", "uncorrected_ecc", "xid")]
    assert told == [1, 2, 0]
    assert value("glowplug_gpu_errors", "0", "xid") == 1
    assert value("glowplug_gpu_bytes", "2:3", "total") == 10 * GIB
    metrics.render(None, {})
    assert value("glowplug_gpu_bytes", "0", "free") is None


class FakeDriver:
    """Readings as the test sets them."""

    def __init__(self, *readings: GpuReading) -> None:
        self.readings = list(readings)
        self.is_closed = False

    def read(self) -> list[GpuReading]:
        return self.readings

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("fields", "level", "seen"),
    [
        ({}, "ok", "compute capability 9.0, driver 570, 4.0 of 24.0 GiB used"),
        ({"is_lost": True}, "fail", "lost"),
        ({"remap_pending": True}, "warn", "wait to be mapped out"),
        ({"remap_failed": True}, "fail", "cannot be mapped out; no worker is sent there"),
        ({"refused": "MIG mode is on and it has no instance: make some"}, "fail", "MIG mode is on"),
        ({"instance": 2}, "ok", "0:2: Stand-in"),
        ({"uncorrected_ecc": 3}, "warn", "3 uncorrected memory errors"),
        ({"architecture": 75}, "warn", "compute capability 7.5"),
    ],
)
def test_doctor_names_what_is_wrong_with_a_gpu(fields: dict[str, Any], level: str, seen: str) -> None:
    """Each with a remedy, none where it is well; the library is let go of."""
    values = {"architecture": 90, **fields}
    driver = FakeDriver(GpuReading(0, "GPU-a", "Stand-in", 24 * GIB, 20 * GIB, driver="570", **values))
    finding = next(host_checks.check_gpu(lambda: driver))
    assert (finding.level, seen in finding.seen, bool(finding.remedy)) == (level, True, level != "ok")
    assert driver.is_closed


def test_doctor_without_a_gpu_or_a_server_says_so_and_fails_nothing(tmp_path: Path) -> None:
    """No driver: the CPU backend is used. No server: nothing to ask for errors that agents have heard of."""
    assert [finding.level for finding in host_checks.check_gpu(lambda: None)] == ["ok"]
    assert list(setup_checks.check_served_gpus(tmp_path)) == []
