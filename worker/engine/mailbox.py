"""The door into the engine thread: what other threads ask of it, in order."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from worker.engine.types import AnyRequest


@dataclass(slots=True)
class Mail:
    """Everything that arrived since the last look."""

    requests: list[AnyRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    stop: bool = False

    @property
    def is_empty(self) -> bool:
        return not (self.requests or self.cancelled or self.stop)

    def add(self, later: Mail) -> None:
        """Take in what arrived after it."""
        self.requests += later.requests
        self.cancelled += later.cancelled
        self.stop |= later.stop


class Mailbox:
    """Thread-safe and never blocking for senders; one thread collects."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._mail = Mail()
        self._is_woken = False

    def submit(self, request: AnyRequest) -> None:
        with self._condition:
            self._mail.requests.append(request)
            self._condition.notify()

    def cancel(self, request_id: str) -> None:
        with self._condition:
            self._mail.cancelled.append(request_id)
            self._condition.notify()

    def stop(self) -> None:
        with self._condition:
            self._mail.stop = True
            self._condition.notify()

    def wake(self) -> None:
        """Make :meth:`wait_collect` return, with nothing if there is nothing."""
        with self._condition:
            self._is_woken = True
            self._condition.notify()

    @property
    def num_requests(self) -> int:
        """Requests not yet collected. Advisory."""
        return len(self._mail.requests)

    def collect_nowait(self) -> Mail:
        """Take what is there."""
        with self._condition:
            mail, self._mail = self._mail, Mail()
            return mail

    def wait_collect(self, timeout_s: float | None = None) -> Mail:
        """Sleep until there is something, :meth:`wake` was called or the time is over, then take what is there."""
        with self._condition:
            self._condition.wait_for(lambda: self._is_woken or not self._mail.is_empty, timeout_s)
            self._is_woken = False
            mail, self._mail = self._mail, Mail()
            return mail
