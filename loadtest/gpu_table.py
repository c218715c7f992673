"""The report of a GPU run as lines of text: each figure beside its ceiling and its bar, or that there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

#: Bars for the 8B-shaped bf16 model, milliseconds to the first token. Source: SPECIFICATION.md.
BARS_MS: Final = {"T3": 450.0, "T2 with a spare": 1500.0, "T2": 2500.0}
_NONE: Final = "no figure"

Figures = dict[str, Any]


def format_report(record: Figures) -> list[str]:
    """Lines of the table, from whatever was measured."""
    lines: list[str] = []
    for part in (_opening, _ladders, _sweep, _http, _peers, _suspension):
        try:
            lines += part(record)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            lines.append(f"{part.__name__.lstrip('_')}: {_NONE} ({type(error).__name__}: {error})")
    return lines


def _opening(record: Figures) -> Iterator[str]:
    opened = record["open"]
    yield (
        f"spare worker: context and modules {opened['context_and_modules_ms']:.0f} ms, warm-up "
        f"{opened['warm_up_ms']:.0f} ms, device memory {opened['spare_device_used_bytes'] / 2**20:.0f} MiB (bar: 700)"
    )
    yield (
        f"ceilings: pinned copy {opened['copy_ceiling_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"device memory {opened['memory_bytes_per_s'] / 1e9:.0f} GB/s"
    )


def _ladders(record: Figures) -> Iterator[str]:
    yield (
        f"{'model':10} {'GB':>5} {'T3 ms':>8} {'T2s ms':>8} {'T3 unver.':>9} {'T2s unver.':>10} {'copy':>6} "
        f"{'decode ms':>9} {'of mem.':>7} {'eager':>7} {'queue':>7} {'b8 ms':>7} {'b32 ms':>7} {'parked MiB':>10}"
    )
    for key, ladder in record.items():
        if not key.startswith("ladder-"):
            continue
        ceiling, memory = ladder["copy_ceiling_bytes_per_s"], ladder["memory_bytes_per_s"]
        for name, model in ladder["models"].items():
            steps = model["decode_ms"]
            yield (
                f"{name:10} {model['weights_bytes'] / 1e9:5.1f} {model['t3_ms']['median']:8.1f} "
                f"{model['t2_spare_ms']['median']:8.1f} {model['t3_unverified_ms']['median']:9.1f} "
                f"{model['t2_spare_unverified_ms']['median']:10.1f} "
                f"{model['t3_copy_bytes_per_s'] / ceiling:6.0%} {steps['1']:9.2f} "
                f"{model['decode_bytes_per_s'] / memory:7.0%} {model['decode_eager_ms']['1']:7.2f} "
                f"{model['queueing_ms']:7.3f} {steps.get('8', 0.0):7.2f} {steps.get('32', 0.0):7.2f} "
                f"{model['parked_device_used_bytes'] / 2**20:10.0f}"
            )
            yield f"{'':10} roofline of a step at batch 1 to 32: {model['weights_bytes'] / memory * 1e3:.2f} ms"


def _sweep(record: Figures) -> Iterator[str]:
    for key, ladder in record.items():
        if key.startswith("ladder-") and ladder.get("sweep"):
            rows = sorted(ladder["sweep"], key=lambda row: -float(row["bytes_per_s"]))
            yield f"sweep of the stream ({len(rows)} settings, best and worst):"
            for row in [*rows[:6], *rows[-2:]]:
                yield (
                    f"  {row['threads']:2} threads, {row['slots']:2} slots of {row['slot_bytes'] >> 20:2} MiB: "
                    f"{row['bytes_per_s'] / 1e9:5.1f} GB/s"
                )


def _http(record: Figures) -> Iterator[str]:
    lines = record["http"]
    for line in lines if isinstance(lines, list) else [lines]:
        if "tier" not in line:
            yield f"HTTP: snapshot built in {line.get('build_s', 0):.0f} s"
        elif "median_ms" not in line:
            yield f"HTTP {line['tier']}: {_NONE}: {line.get('error', '')[:160]}"
        else:
            bar = BARS_MS.get(line["tier"])
            against = f" (bar for 8B bf16: {bar:.0f})" if bar else ""
            if line.get("disk_bytes_per_s"):
                against = (
                    f" (bar: {line['weights_bytes'] / line['disk_bytes_per_s'] * 1e3 + 1e3:.0f}, the disk and 1 s)"
                )
            yield (
                f"HTTP {line['tier']}: {line['median_ms']:.1f} ms{against}, "
                f"{line['min_ms']:.1f} to {line['max_ms']:.1f}, n={line['num_samples']}, "
                f"met {', '.join(line['tiers_seen'])}, device {line.get('device_mib', 'unknown')} MiB"
            )
            yield f"  {', '.join(f'{name} {value:.1f}' for name, value in line['phase_medians_ms'].items())}"


def _peers(record: Figures) -> Iterator[str]:
    for key in ("peer-naive", "peer-fastsafetensors", "peer-runai", "peer-compiled"):
        peer = record.get(key)
        if peer is None or "not_importable" in peer:
            missing = "" if peer is None else f": {', '.join(peer['not_importable'])} cannot be imported"
            yield f"{key}: {_NONE}{missing}"
            continue
        shown = {name: value for name, value in peer.items() if name.endswith("_ms")}
        yield f"{key}: {shown}"
        tiers = record.get("http", [])
        parked = [line for line in tiers if isinstance(line, dict) and line.get("tier") == "T3" and "median_ms" in line]
        if "first_token_ms" in peer and parked:
            yield f"  first token {peer['first_token_ms'] / parked[0]['median_ms']:.0f} times that of T3 (bar: 40)"


def _suspension(record: Figures) -> Iterator[str]:
    yield f"driver's checkpoint: {record.get('suspend', _NONE)}"
