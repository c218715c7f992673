"""The runtime calls of the stand-in. Sizes and addresses are whole numbers, as in CuPy's compiled code."""

import ctypes
import itertools
import mmap
import operator
import threading

CAPACITY_BYTES = 4 << 30
_OUT_OF_MEMORY, _ILLEGAL_ADDRESS, _INVALID_VALUE, _CAPTURE_UNSUPPORTED = 2, 700, 1, 900
_handles = itertools.count(1 << 20)
_blocks = {}  # by address: its memory
_pinned = {}
_registered = {}
_graphs = {}
_lock = threading.RLock()
capturing = None  # (stream, calls)


class CUDARuntimeError(RuntimeError):
    """As CuPy's: ``status`` is the code."""

    def __init__(self, status):
        self.status = status
        super().__init__(f"stand-in: CUDA error {status}")


def new_handle():
    """A stream's or event's number."""
    return next(_handles)


def run(stream, call):
    """Now, or when the graph that ``stream`` captures is launched."""
    with _lock:
        if capturing is not None and capturing[0] == stream:
            capturing[1].append(call)
        else:
            call()


def add_graph(calls):
    """Its handle."""
    handle = new_handle()
    _graphs[handle] = calls
    return handle


def _refuse_in_capture():
    if capturing is not None:
        raise CUDARuntimeError(_CAPTURE_UNSUPPORTED)


def _allocate(table, size):
    size = operator.index(size)
    if size <= 0:
        raise CUDARuntimeError(_INVALID_VALUE)
    memory = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(address, 0xFF, size)
    table[address] = (memory, size)
    return address


def check_range(address, size, *, host=False):
    """A range that lies in one allocation, or CUDA's error for one that does not."""
    address, size = operator.index(address), operator.index(size)
    tables = (_pinned, _registered) if host else (_blocks,)
    for table in tables:
        for start, (_, length) in table.items():
            if start <= address and address + size <= start + length:
                return
    raise CUDARuntimeError(_INVALID_VALUE if host else _ILLEGAL_ADDRESS)


def setDevice(device):
    if operator.index(device) != 0:
        raise CUDARuntimeError(101)


def getDeviceCount():
    return 1


def getDeviceProperties(device):
    return {"name": b"stand-in", "major": 9, "minor": 0, "multiProcessorCount": 4, "totalGlobalMem": CAPACITY_BYTES}


def runtimeGetVersion():
    return 13000


def driverGetVersion():
    return 13000


def malloc(size):
    _refuse_in_capture()
    with _lock:
        if sum(length for _, length in _blocks.values()) + size > CAPACITY_BYTES:
            raise CUDARuntimeError(_OUT_OF_MEMORY)
        return _allocate(_blocks, size)


def free(ptr):
    _refuse_in_capture()
    with _lock:
        if ptr and _blocks.pop(operator.index(ptr), None) is None:
            raise CUDARuntimeError(_INVALID_VALUE)


def hostAlloc(size, flags):
    with _lock:
        return _allocate(_pinned, size)


def freeHost(ptr):
    with _lock:
        del _pinned[operator.index(ptr)]


def hostRegister(ptr, size, flags):
    with _lock:
        _registered[operator.index(ptr)] = (None, operator.index(size))


def hostUnregister(ptr):
    with _lock:
        del _registered[operator.index(ptr)]


def memGetInfo():
    used = sum(length for _, length in list(_blocks.values()))
    return CAPACITY_BYTES - used, CAPACITY_BYTES


def memcpyAsync(dst, src, size, kind, stream):
    with _lock:
        check_range(dst, size, host=kind == 2)
        check_range(src, size, host=kind == 1)
    run(stream, lambda: ctypes.memmove(dst, src, size))


def memsetAsync(ptr, value, size, stream):
    with _lock:
        check_range(ptr, size)
    run(stream, lambda: ctypes.memset(ptr, value, size))


def eventRecord(event, stream):
    operator.index(event), operator.index(stream)


def streamWaitEvent(stream, event, flags=0):
    operator.index(event), operator.index(stream)


def eventSynchronize(event):
    _refuse_in_capture()


def streamSynchronize(stream):
    _refuse_in_capture()


def deviceSynchronize():
    _refuse_in_capture()


def graphLaunch(graphExec, stream):
    calls = _graphs[operator.index(graphExec)]
    with _lock:
        for call in calls:
            run(stream, call)
