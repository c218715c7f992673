"""Runs the CUDA kernels' own source on the CPU, for tests. See DESIGN.md of the kernels."""
