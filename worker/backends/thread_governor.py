"""Decides how many threads a matrix product uses while other processes want the same cores.

NumKong's pool splits a product evenly and spins until every thread is done. That is fastest while each thread has a
core to itself; when one has to wait for a core, the product waits with it for a whole scheduler quantum: on two
cores beside one busy process, 3 to 4 ms instead of 0.15 ms, thirty times as long, in every layer. One thread alone
then takes only twice its usual time. So: after a few stalled products use one thread for a while, then try again.
"""

from __future__ import annotations

from typing import Final

_STALLS_TO_GIVE_UP: Final = 3
_CALM_PRODUCTS: Final = 256  # this many in time forget earlier stalls
_MIN_SINGLE_PRODUCTS: Final = 250
_MAX_SINGLE_PRODUCTS: Final = 32_000


class ThreadGovernor:
    """Thread count of a model's products. Engine thread only.

    =========== =========== =======================================================
    from        to          when
    =========== =========== =======================================================
    all threads one thread  three products stalled, with less than 256 in time between
    one thread  all threads a number of products passed; it doubles with each failed try
    (new)       one thread  another process is known to be busy (``begins_single``)
    =========== =========== =======================================================
    """

    def __init__(self, max_threads: int, *, begins_single: bool = False) -> None:
        """``begins_single``: another process is known to be busy now, as it is while weights are being filled in."""
        self.num_threads = 1 if begins_single else max_threads  # read before each product
        self.num_fallbacks = 0
        self.max_threads = max_threads
        self._stalls = 0
        self._calm = 0
        self._single_left = _MIN_SINGLE_PRODUCTS if begins_single else 0
        self._single_products = _MIN_SINGLE_PRODUCTS

    def observe(self, elapsed_ns: int, stall_ns: int) -> None:
        """Take note of a product that took ``elapsed_ns``; ``stall_ns`` is what it never takes undisturbed."""
        if self.num_threads == 1:
            self._single_left -= 1
            if self._single_left <= 0:
                self.num_threads = self.max_threads
            return
        if elapsed_ns <= stall_ns:
            self._calm += 1
            if self._calm == _CALM_PRODUCTS:
                self._stalls = 0
                self._single_products = max(_MIN_SINGLE_PRODUCTS, self._single_products // 2)
                self._calm = 0
            return
        self._calm = 0
        self._stalls += 1
        if self._stalls >= _STALLS_TO_GIVE_UP:
            self._stalls = 0
            self.num_threads = 1
            self.num_fallbacks += 1
            self._single_left = self._single_products
            self._single_products = min(_MAX_SINGLE_PRODUCTS, 2 * self._single_products)


def compute_stall_ns(weight_bytes: int, num_tokens: int) -> int:
    """Nanoseconds beyond which a product must have waited for a core.

    A tenth of the bandwidth that two threads reach at one token (20 bytes a nanosecond), half of that at 64 more
    tokens and so on, plus 0.5 ms.
    """
    return 500_000 + weight_bytes * (64 + num_tokens) // 128
