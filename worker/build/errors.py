"""Errors of importing a model and building its snapshot."""

from __future__ import annotations


class BuildError(Exception):
    """Base of every error of ``glowplug build``; the message says what, what was seen and the remedy."""


class UnsupportedModelError(BuildError):
    """The model is well formed but needs something that glowplug does not run; the message lists what it does."""


class MalformedModelError(BuildError):
    """A model file is truncated, lies about its contents, or points outside its folder."""


class FetchError(BuildError):
    """A model package could not be fetched, or is not the one that was pinned."""
