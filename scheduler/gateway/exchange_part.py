"""One generate request of a call, as the exchange that holds it sees it."""

from __future__ import annotations

from scheduler.contract.messages import GenerateRequest, TerminalFrame, Usage
from scheduler.dispatch import estimate_tokens


class Part:
    """One generate request of an exchange. ``terminal`` is set once, by its last frame."""

    __slots__ = (
        "choice_offset",
        "has_frames",
        "index",
        "marks",
        "may_be_queued",
        "num_streamed_tokens",
        "request",
        "span_id",
        "terminal",
    )

    def __init__(self, request: GenerateRequest, index: int, span_id: str = "") -> None:
        self.request = request
        self.span_id = span_id  # its own in a distributed trace; empty: not recorded
        self.index = index
        self.choice_offset = index * request.num_choices
        self.marks: dict[str, int] = dict(request.marks)
        self.terminal: TerminalFrame | None = None
        self.may_be_queued = False
        self.has_frames = False
        self.num_streamed_tokens = 0

    @property
    def usage(self) -> Usage:
        """Tokens used, as told at the end; until then, or where the end never came, what has been seen of them."""
        if self.terminal is not None and self.terminal.usage.prompt_tokens:
            return self.terminal.usage
        prompt_tokens = estimate_tokens(self.request.prompt) if self.num_streamed_tokens else 0
        return Usage(prompt_tokens, self.num_streamed_tokens)
