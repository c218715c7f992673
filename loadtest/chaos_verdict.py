"""The verdict of a chaos run, from the clients' ledgers and the faults that struck."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from loadtest.chaos_clients import Entry
from loadtest.chaos_faults import StruckFault
from loadtest.results import machine, quantile

#: A stream counts as struck when its longest silence around a fault begins this close to it.
AROUND_S: Final = 0.3


@dataclass(frozen=True, slots=True)
class Verdict:
    """Counts of one run. Lost, gaps, repeats, wrong texts and double ends must be 0."""

    sent: int
    accepted: int
    outcomes: dict[str, int]
    errors: dict[str, int]
    refusals: dict[str, int]
    lost: int
    gaps: int
    repeats: int
    wrong: int
    double_ends: int
    resumed: int
    faults: dict[str, int]
    recovery_s: dict[str, tuple[int, float, float]]  # fault -> (streams, p50, p99)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.gaps or self.repeats or self.wrong or self.double_ends)

    def as_json(self, seed: int, minutes: float) -> dict[str, Any]:
        """For the results folder; times in seconds."""
        recovery = {
            name: {"streams": count, "p50_s": round(p50, 3), "p99_s": round(p99, 3)}
            for name, (count, p50, p99) in self.recovery_s.items()
        }
        return {
            "metric": "chaos",
            "seed": seed,
            "minutes": minutes,
            "machine": machine(),
            **{name: getattr(self, name) for name in self.__slots__ if name != "recovery_s"},
            "recovery": recovery,
        }


def judge(ledger: list[Entry], struck: list[StruckFault]) -> Verdict:
    """Count what happened to every request."""
    accepted = [entry for entry in ledger if entry.accepted_s]
    return Verdict(
        sent=len(ledger),
        accepted=len(accepted),
        outcomes=dict(Counter(entry.outcome for entry in ledger)),
        errors=dict(Counter(entry.reason for entry in ledger if entry.outcome == "errored")),
        refusals=dict(Counter(entry.reason for entry in ledger if entry.outcome in ("refused", "unanswered"))),
        lost=sum(entry.outcome == "lost" for entry in accepted),
        gaps=sum(entry.gaps for entry in accepted),
        repeats=sum(entry.repeats for entry in accepted),
        wrong=sum(entry.is_wrong for entry in accepted),
        double_ends=sum(entry.terminals > 1 for entry in accepted),
        resumed=sum(entry.resumed > 0 for entry in accepted),
        faults=dict(Counter(fault.name for fault in struck)),
        recovery_s=_measure_recoveries(accepted, struck),
    )


def _measure_recoveries(entries: list[Entry], struck: list[StruckFault]) -> dict[str, tuple[int, float, float]]:
    """For each kind of single fault: from the fault to the next token of each stream that fell silent at it."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for fault in struck:
        if fault.is_pair:
            continue
        for entry in entries:
            if (recovered_s := _recovery_of(entry, fault.at_s)) is not None:
                times[fault.name].append(recovered_s)
    return {name: (len(found), quantile(found, 0.5), quantile(found, 0.99)) for name, found in sorted(times.items())}


def _recovery_of(entry: Entry, fault_s: float) -> float | None:
    """Seconds from the fault to the end of the longest silence that began around it; None: not in mid-stream then."""
    at_s = entry.content_at_s
    if len(at_s) < 2 or not at_s[0] < fault_s < at_s[-1]:
        return None
    silences = [
        (after - before, after) for before, after in pairwise(at_s) if before < fault_s + AROUND_S and after > fault_s
    ]
    return max(silences)[1] - fault_s if silences else None


def describe(verdict: Verdict, seed: int) -> str:
    """The verdict as lines for people."""
    num_faults = sum(verdict.faults.values())
    lines = [
        f"seed {seed}: {num_faults} faults of {len(verdict.faults)} kinds: "
        + ", ".join(f"{name} {count}" for name, count in sorted(verdict.faults.items())),
        f"requests {verdict.sent}, accepted {verdict.accepted}: "
        + ", ".join(f"{name} {count}" for name, count in sorted(verdict.outcomes.items()))
        + f"; resumed by their client {verdict.resumed}",
        f"errors {verdict.errors or 'none'}; not accepted {verdict.refusals or 'none'}",
        f"lost {verdict.lost}, gaps {verdict.gaps}, repeats {verdict.repeats}, wrong text {verdict.wrong}, "
        f"double ends {verdict.double_ends}",
    ]
    for name, (count, p50, p99) in verdict.recovery_s.items():
        lines.append(f"  recovery after {name:<18} p50 {p50:6.2f} s  p99 {p99:6.2f} s  ({count} streams)")
    lines.append("CLEAN" if verdict.is_clean else "NOT CLEAN")
    return "\n".join(lines)
