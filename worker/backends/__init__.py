"""Devices that run a guest's recorded tensor program: NumPy (reference), NumKong (CPU), CuPy (GPU)."""
