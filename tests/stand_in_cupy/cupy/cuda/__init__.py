"""Streams, events and graphs of the stand-in."""

from cupy.cuda import function, runtime

__all__ = ["Event", "Graph", "Stream", "function", "runtime"]


class Graph:
    """What a stream has captured."""

    def __init__(self, calls):
        self.graph = self.graphExec = runtime.add_graph(calls)


class Stream:
    """In order by nature: all work runs when it is queued."""

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.ptr = runtime.new_handle()

    def begin_capture(self, mode=None):
        """Record what is queued from now on."""
        if runtime.capturing is not None:
            raise runtime.CUDARuntimeError(900)
        runtime.capturing = (self.ptr, [])

    def end_capture(self):
        """The graph."""
        (_, calls), runtime.capturing = runtime.capturing, None
        return Graph(calls)


class Event:
    """Passed as soon as it is recorded."""

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.ptr = runtime.new_handle()
