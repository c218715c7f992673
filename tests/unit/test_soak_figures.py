"""The soak's own figures: a slope that is there is found with its confidence, and none is found where there is none."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest

from loadtest.soak import Outcome, by_minute
from loadtest.soak_samples import Sample, Samples, client_sockets, fit_slope
from loadtest.soak_store import KeyKind


def test_a_leak_is_outside_its_confidence_and_noise_is_not() -> None:
    """Ten minutes of samples each 5 s: 6 MiB an hour under noise of 0.1 MiB is seen, noise alone is not."""
    rng = random.Random(1)
    hours = [i * 5 / 3600 for i in range(120)]
    leaking = [(x, 100 + 6 * x + rng.gauss(0, 0.1)) for x in hours]
    steady = [(x, 100 + rng.gauss(0, 0.1)) for x in hours]
    slope, confidence = fit_slope(leaking)
    assert abs(slope - 6) <= confidence < 1
    slope, confidence = fit_slope(steady)
    assert abs(slope) <= confidence < 1


def test_an_exact_line_has_no_doubt() -> None:
    """Points on a line give its slope; fewer than three, or all at one instant, give an error."""
    assert fit_slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx((2.0, 0.0))
    with pytest.raises(ValueError, match="3"):
        fit_slope([(0.0, 1.0), (1.0, 3.0)])
    with pytest.raises(ValueError, match="one instant"):
        fit_slope([(1.0, 1.0), (1.0, 3.0), (1.0, 5.0)])


def test_slopes_leave_out_the_settling_time_and_other_processes_of_the_role() -> None:
    """A worker that was replaced counts by the process that was seen longest."""
    samples = Samples(1, Path("/nonexistent"))
    flat = {"rss_mib": 50.0, "pss_mib": 40.0, "fds": 9.0, "threads": 3.0}
    samples.rows = [Sample(10.0 * i, "worker", 7, {**flat, "rss_mib": 90.0 if i < 6 else 50.0}) for i in range(20)]
    samples.rows += [Sample(5.0, "worker", 8, {**flat, "rss_mib": 1.0})]
    found = samples.slopes(60.0)["worker"]
    assert found["starts"] == 2
    assert found["n"] == 14
    assert found["slopes"]["rss_mib"]["slope_per_hour"] == 0


def test_minutes_count_by_when_a_request_was_sent_and_leave_out_failures() -> None:
    """p99 of each minute is of the requests sent in it."""
    outcomes = [Outcome(1.0, 10.0, ""), Outcome(59.0, 30.0, ""), Outcome(61.0, 50.0, ""), Outcome(62.0, 0.0, "cut")]
    assert by_minute(outcomes) == [
        {"minute": 0, "n": 2, "p50_ms": 20.0, "p99_ms": 29.8},
        {"minute": 1, "n": 1, "p50_ms": 50.0, "p99_ms": 50.0},
    ]


def test_what_fills_up_is_slower_in_the_later_half() -> None:
    """A cache that is full after a minute has a slope over all samples, and none in the later half."""
    samples = Samples(1, Path("/nonexistent"))
    steady = {"pss_mib": 40.0, "fds": 9.0, "threads": 3.0}
    samples.rows = [Sample(10.0 * i, "worker", 7, {**steady, "rss_mib": 50.0 + min(i, 6)}) for i in range(30)]
    slope = samples.slopes(0.0)["worker"]["slopes"]["rss_mib"]
    assert slope["slope_per_hour"] > 10
    assert slope["late_slope_per_hour"] == 0


def test_connections_of_clients_are_told_from_other_descriptors() -> None:
    """Three clients of a listener count as three; its own socket and theirs at the other end do not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert client_sockets(os.getpid(), port) == 0
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        accepted = [listener.accept()[0] for _ in range(3)]
        assert client_sockets(os.getpid(), port) == 3
        for one in (*clients, *accepted):
            one.close()


def test_what_has_an_end_has_a_bound() -> None:
    """Keys with a TTL come to what arrives within it, traces to as many as are kept; keys without one have no bound."""
    mib = 1024 * 1024
    assert KeyKind("gp:log", 10, mib / 100, 600).bound_mib(2.0) == pytest.approx(12.0)
    assert KeyKind("gp:trace", 10, mib / 1000, 3600).bound_mib(100.0) == pytest.approx(10.0)
    assert KeyKind("gp:log", 10_000, mib / 1000, 1).bound_mib(0.1) == pytest.approx(10.0)  # more than that are there
    assert KeyKind("gp:odd", 10, 100.0, None).bound_mib(2.0) is None
