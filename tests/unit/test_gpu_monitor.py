"""What an agent makes of its GPUs' readings: whose memory is whose, and which errors are faults."""

from __future__ import annotations

import pytest
import structlog

from worker.gpu_monitor import MAX_XIDS, GpuMonitor
from worker.nvml import GpuReading, is_allowed, open_nvml

GIB = 1 << 30


class FakeSource:
    """Readings as the test sets them."""

    def __init__(self, *readings: GpuReading) -> None:
        self.readings = list(readings)
        self.num_reads = 0

    def read(self) -> list[GpuReading]:
        self.num_reads += 1
        return self.readings

    def close(self) -> None:
        pass


def reading(**fields: object) -> GpuReading:
    return GpuReading(0, "GPU-a", "Stand-in", 24 * GIB, 20 * GIB, 90, "570", **fields)  # type: ignore[arg-type]


def test_a_machine_without_a_driver_has_no_gpus_and_no_costs() -> None:
    """No library, no monitor's work."""
    assert open_nvml() is None


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, True), ("", False), ("1", True), ("0", False), ("GPU-abc", True), ("GPU-x, GPU-ab", True), ("-1", False)],
)
def test_visible_devices_are_a_limit(visible: str | None, expected: bool) -> None:
    """The variable that limits programs limits what the node offers."""
    assert is_allowed(1, "GPU-abcdef", visible) is expected


async def test_a_report_says_whose_memory_is_whose() -> None:
    """Workers and warm spares by their process ids; strangers' memory only lessens what is free."""
    monitor = GpuMonitor(lambda: FakeSource(reading(used_by_pid={10: GIB, 11: GIB // 2, 99: GIB})))
    await monitor.refresh()
    (report,) = monitor.reports({"w1": 10, "w2": 12}, {"GPU-a": {11: True, 13: False}})
    assert (report.worker_bytes, report.spare_workers, report.spare_bytes) == ({"w1": GIB}, 1, GIB // 2)
    assert (report.total_bytes, report.free_bytes, report.fault) == (24 * GIB, 20 * GIB, "")
    assert monitor.devices() == ["GPU-a"]


async def test_an_error_of_the_device_is_a_fault_and_a_programs_is_not() -> None:
    """Xid 31 (a program's bad access) leaves the GPU in use; 79 does not, however many others follow."""
    source = FakeSource(reading(new_xids=(31,)))
    monitor = GpuMonitor(lambda: source)
    await monitor.refresh()
    assert (monitor.reports({}, {})[0].fault, monitor.reports({}, {})[0].xids) == ("", (31,))
    source.readings = [reading(new_xids=(79, *[13] * (MAX_XIDS + 2)))]
    await monitor.refresh(now=True)
    (report,) = monitor.reports({}, {})
    assert "79" in report.fault
    assert "fallen off the bus" in report.fault
    assert report.xids == (13,) * MAX_XIDS
    assert monitor.devices() == []


async def test_a_lost_gpu_is_a_fault_until_it_is_back() -> None:
    """What the driver cannot read gets no worker."""
    source = FakeSource(reading(is_lost=True))
    monitor = GpuMonitor(lambda: source)
    await monitor.refresh()
    assert "lost" in monitor.reports({}, {})[0].fault
    source.readings = [reading()]
    await monitor.refresh(now=True)
    assert monitor.devices() == ["GPU-a"]


async def test_the_driver_is_asked_at_most_once_a_second() -> None:
    """Beats in quick succession share a reading; whoever needs a fresh one says so."""
    source = FakeSource(reading())
    monitor = GpuMonitor(lambda: source)
    for _ in range(5):
        await monitor.refresh()
    assert source.num_reads == 1
    await monitor.refresh(now=True)
    assert source.num_reads == 2


@pytest.mark.parametrize(
    ("fields", "cause", "acceptable"),
    [
        ({"uncorrected_ecc": 2}, "2 uncorrected memory errors", True),
        ({"new_xids": (48,)}, "Xid 48", True),
        ({"remap_pending": True}, "wait to be mapped out", True),
        ({"remap_failed": True, "remap_pending": True}, "cannot be mapped out", False),
        ({"refused": "MIG mode is on and it has no instance: make some"}, "no instance", False),
    ],
)
async def test_a_gpu_with_bad_memory_is_out_of_use_until_reset_or_accepted(
    fields: dict[str, object], cause: str, acceptable: bool
) -> None:
    """An operator's reload takes back what is past, not what the driver still says; a reset ends it either way."""
    source = FakeSource(reading(**fields))
    monitor = GpuMonitor(lambda: source)
    with structlog.testing.capture_logs() as logs:
        await monitor.refresh()
        await monitor.refresh(now=True)
        assert monitor.devices() == []
        assert cause in monitor.reports({}, {})[0].fault
        monitor.accept()
        assert (monitor.devices() == ["GPU-a"]) is acceptable
        source.readings = [reading()]
        await monitor.refresh(now=True)
        assert (monitor.devices(), monitor.reports({}, {})[0].fault) == (["GPU-a"], "")
    told = [line for line in logs if line["event"] in ("gpu_out_of_use", "gpu_in_use_again")]
    assert [line["event"] for line in told] == ["gpu_out_of_use", "gpu_in_use_again"]
    assert cause in told[0]["reason"]


async def test_accepted_memory_errors_count_anew_after_more_of_them_or_a_reset() -> None:
    """What an operator accepted is the count so far."""
    source = FakeSource(reading(uncorrected_ecc=2))
    monitor = GpuMonitor(lambda: source)
    await monitor.refresh()
    monitor.accept()
    assert monitor.devices() == ["GPU-a"]
    assert monitor.reports({}, {})[0].uncorrected_ecc == 2
    for count, expected in ((3, []), (2, ["GPU-a"]), (0, ["GPU-a"]), (1, [])):
        source.readings = [reading(uncorrected_ecc=count)]
        await monitor.refresh(now=True)
        assert monitor.devices() == expected, count
