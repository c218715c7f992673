"""Continuous batching: sequences, KV slots, the step loop and sampling."""
