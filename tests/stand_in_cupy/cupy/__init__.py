"""A stand-in for CuPy on machines without a GPU: the calls that the GPU backend makes, with CuPy's own signatures.

Device memory is host memory, kernels are the shipped ones on the CPU, work runs when it is queued (the emulated device
is for order), and captured work when a graph is launched. Arguments are checked as CuPy's compiled code checks them.
Source of signatures: cupy 14.2, cupy_backends/cuda/api/runtime.pyx, cupy/cuda/{function,stream,graph}.pyx.
"""

from cupy import cuda

__version__ = "14.2.0+stand-in"
__all__ = ["cuda"]
