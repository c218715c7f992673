"""Every block of the documentation that somebody may copy is run as written, page by page, or checked by its tool."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.certificates import make_certificate
from tests.document_pages import NOT_RUN, ROOT, SERVING, Block, Reader, make_script, read_blocks
from tests.model_fixtures import BuiltState

#: For all commands of a page; a fresh machine's first token is promised within 180 s, downloads included.
PAGE_LIMIT_S = 180
PAGES = sorted(str(path.relative_to(ROOT)) for path in (*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"))
#: Pages that are stories from nothing, and what must be in what they print.
FROM_NOTHING = {
    "README.md": ["data: {", "prefill", "Acme", r'"content":"\{.*\\"name\\"'],
    "docs/tutorial.md": ["Paris", "cold start from T1", "cold start from T2"],
    "docs/how-to/systemd.md": ["signs from now on", "snapshot  smollm2"],
    "docs/how-to/migrate-from-llama-swap-or-ollama.md": ["snapshot  m", "Paris"],
}
#: Pages for people who have a model and a server.
BESIDE_A_SERVER = {
    "docs/batches.md": ["results.jsonl", "validating|in_progress|finalizing|completed"],
    "docs/how-to/keys-and-tenants.md": ["default", "acme"],
    "docs/how-to/nginx.md": ["kept as a digest"],
    "docs/how-to/tracing.md": ["OTEL_EXPORTER_OTLP_ENDPOINT=http"],
}
#: Written from the commands themselves, and compared with them by tests/unit/test_terminal_commands.py.
GENERATED = ("docs/cli.md",)


@pytest.fixture
def reader(short_tmp_path: Path, smollm2_gguf: Path) -> Reader:
    """Somebody new, with a certificate, a model file, and the downloads done by `make test`."""
    make_certificate(short_tmp_path)
    (short_tmp_path / "m.gguf").symlink_to(smollm2_gguf)
    return Reader(short_tmp_path)


def test_each_page_with_commands_is_run() -> None:
    """A page that gets its first command must be put on one of the lists; a line is left out for a reason only."""
    with_commands = {
        page for page in PAGES if any(b.language in ("sh", "python", "console") for b in read_blocks(page))
    }
    assert with_commands == {*FROM_NOTHING, *BESIDE_A_SERVER}
    languages = {block.language for page in set(PAGES) - set(GENERATED) for block in read_blocks(page)}
    assert languages == {"sh", "python", "console", "yaml", "text", "mermaid"}  # a new one needs a way to be checked
    text = "\n".join(block.text for page in PAGES for block in read_blocks(page))
    assert [line for line in NOT_RUN if line not in text] == []


@pytest.mark.timeout(PAGE_LIMIT_S + 20)
@pytest.mark.parametrize("page", FROM_NOTHING)
def test_a_page_from_nothing_works_as_written(page: str, reader: Reader) -> None:
    """Every command in order, from an empty folder, ends with status 0, and nothing is left running."""
    script = make_script(read_blocks(page), reader.port).replace("/var/lib/glowplug", str(reader.state_dir))
    printed = reader.run(script, within_s=PAGE_LIMIT_S)
    for expected in FROM_NOTHING[page]:
        assert re.search(expected, printed), f"{expected}\n{printed[-6000:]}"
    assert not list(reader.folder.rglob("*.sock"))


@pytest.mark.timeout(PAGE_LIMIT_S + 20)
def test_pages_about_something_work_as_written(reader: Reader, smollm2_built: BuiltState) -> None:
    """Their commands end with status 0 where a model is built and a server runs: one, which the pages share."""
    reader.take_state(smollm2_built.state_dir)
    pages = [block for page in BESIDE_A_SERVER for block in (Block("sh", f": {page}"), *read_blocks(page))]
    printed = reader.run(make_script([SERVING, *pages], reader.port), within_s=PAGE_LIMIT_S)
    for page, all_expected in BESIDE_A_SERVER.items():
        part = printed.partition(f"+ : {page}\n")[2].partition("\n+ : docs/")[0]
        for expected in all_expected:
            assert re.search(expected, part), f"{page}: {expected}\n{part[-6000:]}"
