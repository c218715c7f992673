"""Continuous batching: sequences, KV blocks, the step loop and sampling."""
