"""Errors of the guests package."""

from __future__ import annotations


class GuestError(Exception):
    """Base of every error that a guest, its module or its ABI can cause."""


class GuestModuleRefused(GuestError):
    """The WebAssembly module breaks a rule of the ABI or of the snapshotter; the message names the rule."""


class GuestTrap(GuestError):
    """The guest trapped (or ran into its deadline). The instance must be dropped.

    ``code`` is Wasmtime's trap code, or None when the trap came from a host function.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class GuestContractError(GuestError):
    """The guest returned something outside the ABI: a pointer out of range, an unknown handle, an error code."""


class GuestProcessError(GuestError):
    """The process that compiles or initialises a guest crashed, ran into a limit or answered with nonsense."""


class GuestIncompatible(GuestError):
    """A compiled guest was made by another Wasmtime version, configuration or CPU; it must be compiled again."""


class ProgramError(GuestError):
    """A recorded tensor program is malformed; the message names the operation."""
