"""The GPU backend: one engine protocol, one file that imports CuPy, one emulated device that catches missing waits."""
