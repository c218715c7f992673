"""The shipped guests are what their sources build to."""

from __future__ import annotations

from pathlib import Path

import pytest

from guests.build import SHIPPED, compile_c, is_current, main
from guests.errors import GuestError, GuestModuleRefused


@pytest.mark.parametrize("guest", SHIPPED, ids=lambda guest: guest.name)
def test_the_committed_file_is_what_the_sources_build_to(guest: object) -> None:
    """Rebuilding in a temporary folder gives the same bytes."""
    assert is_current(guest)  # type: ignore[arg-type]  # pytest's parameter is untyped


def test_a_compiler_error_is_shown(tmp_path: Path) -> None:
    """The message holds what the compiler said."""
    source = tmp_path / "broken.c"
    source.write_text("int broken(\n")
    with pytest.raises(GuestError, match=r"broken\.c"):
        compile_c([str(source)], tmp_path / "broken.wasm")


def test_a_guest_that_breaks_the_abi_does_not_build(tmp_path: Path) -> None:
    """A module that compiles but lacks exports is refused at build, not at the first request."""
    source = tmp_path / "empty.c"
    source.write_text('#include "glowplug.h"\nGP_EXPORT("gp_abi") int32_t gp_abi(void) { return 1; }\n')
    with pytest.raises(GuestModuleRefused, match="gp_init"):
        compile_c([str(source)], tmp_path / "empty.wasm")


def test_the_command_checks_and_names_unknown_guests(capsys: pytest.CaptureFixture[str]) -> None:
    """--check reports; an unknown name is a usage error."""
    assert main(["--check", "toy"]) == 0
    assert "toy: up to date" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["nonesuch"])
