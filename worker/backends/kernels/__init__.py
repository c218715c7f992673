"""CUDA C kernels, the fatbin they are built to, and their emulation on the CPU. See DESIGN.md here."""
