"""Whose turn it is: interactive before batch, then the tenant that was served least, then order of arrival.

A tenant's service is the number of tokens computed for it here, prompt and completion alike; tokens taken over from
the cache are free. A tenant that comes back is lifted to the least served one that is here, so that nobody saves up a
claim by staying away. Source: Sheng et al. 2024, "Fairness in Serving Large Language Models", arXiv:2401.00588
(virtual token counter).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from scheduler.contract.states import Priority
from worker.engine.sequence import RunningRequest

_Party = tuple[bool, str]  # whether batch, and the tenant: the classes are counted apart

#: Tenants remembered when they have nothing here; beyond, their count is forgotten.
MAX_ABSENT_TENANTS: Final = 1024


class ServiceOrder:
    """Counts what tenants got. Owned by the engine's step loop."""

    def __init__(self) -> None:
        self._served_tokens: dict[_Party, int] = {}

    def join(self, request: RunningRequest, present: Iterable[RunningRequest]) -> None:
        """A request arrives; ``present`` are those that wait or run."""
        party = _party_of(request)
        parties = {_party_of(other) for other in present if _party_of(other)[0] == party[0]}
        if party in parties:
            return
        here = [self._served_tokens.get(other, 0) for other in parties]
        # With nobody here all start alike, however much each of them got in earlier times.
        least = min(here) if here else max(self._served_tokens.values(), default=0)
        if len(self._served_tokens) >= MAX_ABSENT_TENANTS + len(parties):
            self._served_tokens = {other: self._served_tokens.get(other, 0) for other in parties}
        self._served_tokens[party] = max(self._served_tokens.get(party, 0), least)

    def charge(self, request: RunningRequest, num_tokens: int) -> None:
        """``num_tokens`` were computed for ``request``."""
        party = _party_of(request)
        self._served_tokens[party] = self._served_tokens.get(party, 0) + num_tokens

    def rank(self, request: RunningRequest) -> tuple[bool, int, int]:
        """Sort key: the least is served next."""
        is_batch, arrival = request.service_order
        return (is_batch, self._served_tokens.get(_party_of(request), 0), arrival)

    def choose_next(self, waiting: Sequence[RunningRequest]) -> RunningRequest:
        """The request to admit next. Nobody overtakes it, so that a large one finds room in the end: while it waits
        its tenant's count stands still, and those of the others grow."""
        return waiting[0] if len(waiting) == 1 else min(waiting, key=self.rank)


def _party_of(request: RunningRequest) -> _Party:
    return (request.request.priority is not Priority.INTERACTIVE, request.request.tenant)
