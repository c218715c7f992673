"""What a worker's engine looks like to everyone else, whether its model generates or encodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

from worker.backends.encoder_protocol import BoundEncoder, EncoderPlan
from worker.backends.protocol import Backend, BoundModel, ModelPlan
from worker.engine.encoder_engine import EncoderEngine
from worker.engine.engine import Engine
from worker.engine.engine_statistics import EngineStatistics
from worker.engine.parking import IdleParking
from worker.engine.types import AnyRequest, RequestStep
from worker.loaded_model import LoadedEncoder, LoadedModel


class StepLoop(Protocol):
    """An engine. All but :meth:`run` are safe from any thread."""

    def submit(self, request: AnyRequest) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def stop(self) -> None: ...

    def statistics(self) -> EngineStatistics: ...

    def run(self) -> None: ...


def bind_plan(backend: Backend, plan: ModelPlan | EncoderPlan) -> BoundModel | BoundEncoder:
    """``plan`` bound to ``backend``, by its kind.

    Raises:
        BackendError: the backend cannot run it.
    """
    return backend.bind_encoder(plan) if isinstance(plan, EncoderPlan) else backend.bind(plan)


def make_step_loop(
    model: LoadedModel | LoadedEncoder,
    bound: BoundModel | BoundEncoder,
    *,
    max_running: int,
    kv_budget_bytes: int,
    on_steps: Callable[[list[RequestStep]], None],
    max_draft_tokens: int = 0,
    parking: IdleParking | None = None,
) -> StepLoop:
    """The engine of ``model``; encoders have no drafts and are not parked.

    Requires: ``bound`` is its plan, bound by :func:`bind_plan`.
    """
    if isinstance(model, LoadedEncoder):
        return EncoderEngine(model, cast(BoundEncoder, bound), on_steps=on_steps)
    bound_model = cast(BoundModel, bound)
    engine = Engine(
        model,
        bound_model,
        max_running=max_running,
        kv_budget_bytes=kv_budget_bytes,
        on_steps=on_steps,
        max_draft_tokens=max_draft_tokens,
        parking=parking,
    )
    if parking is not None:
        parking.attach(lambda: engine.statistics().num_waiting > 0)
    return engine
