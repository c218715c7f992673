"""What a build tells its caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from snapshots.manifest import Manifest
from worker.build.quantize import WeightFormat


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build made."""

    name: str
    snapshot_id: str
    architecture: str
    weight_format: WeightFormat
    num_parameters: int
    weights_bytes: int
    guest_bytes: int  # compiled and WebAssembly
    wall_s: float
    primed_tokens: tuple[int, ...] = ()  # of each primed prefix
    primed_bytes: int = 0

    @classmethod
    def of(cls, manifest: Manifest, *, weight_format: WeightFormat, num_parameters: int, wall_s: float) -> Self:
        """The report on a manifest that was just written."""
        primed = manifest.primed_prefixes
        return cls(
            name=manifest.name,
            snapshot_id=manifest.snapshot_id,
            architecture=manifest.card.architecture,
            weight_format=weight_format,
            num_parameters=num_parameters,
            weights_bytes=manifest.weights.size_bytes,
            guest_bytes=manifest.guest_cwasm.size_bytes + manifest.guest_wasm.size_bytes,
            wall_s=wall_s,
            primed_tokens=tuple(prefix.num_tokens for prefix in manifest.prefixes),
            primed_bytes=0 if primed is None else primed.size_bytes,
        )
