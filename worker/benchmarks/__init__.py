"""Measurements of single parts of a worker, run by hand."""
