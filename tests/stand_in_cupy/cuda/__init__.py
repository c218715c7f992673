"""Stands in for NVIDIA's namespace package."""
