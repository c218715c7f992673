"""Log files: whole lines from several processes, rotation by size, and no harm from a disk that refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from scheduler.contract.log_file import LOG_NAME, LogFile

WRITER = """
import sys
from pathlib import Path
from scheduler.contract.log_file import LogFile
file = LogFile(Path(sys.argv[1]), max_bytes=4000, check_every_lines=4)
for i in range(300):
    file.write_line(f'{{"who": "{sys.argv[2]}", "i": {i}, "pad": "{"x" * 40}"}}')
"""


def test_lines_of_several_processes_stay_whole_while_the_file_is_rotated(tmp_path: Path) -> None:
    """Three writers rotate one file among them: every line is whole, no file grows far, the newest lines are there."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(n)]) for n in range(3)]
    assert [writer.wait(30) for writer in writers] == [0, 0, 0]
    files = sorted(tmp_path.iterdir())
    assert 2 <= len(files) <= 5
    assert all(file.stat().st_size < 6000 for file in files)
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert any(line["i"] == 299 for line in lines)


def test_the_file_is_private_and_a_refusing_folder_is_harmless(tmp_path: Path) -> None:
    """Mode 0600; where no file can be made, writing does nothing."""
    LogFile(tmp_path).write_line("{}")
    assert (tmp_path / LOG_NAME).stat().st_mode & 0o777 == 0o600
    (tmp_path / "taken").write_text("")
    LogFile(tmp_path / "taken" / "log").write_line("{}")


def test_format_is_an_option_and_the_file_is_always_json(tmp_path: Path) -> None:
    """`console` on stderr, JSON in the file, with the component."""
    script = (
        "import sys, pathlib, structlog\nfrom scheduler.contract.telemetry import configure_logging\n"
        "configure_logging(component='x', log_format=sys.argv[1], log_dir=pathlib.Path(sys.argv[2]))\n"
        "structlog.get_logger().info('hello', number=3)\n"
    )
    for log_format in ("console", "json", "auto"):
        done = subprocess.run(
            [sys.executable, "-c", script, log_format, str(tmp_path)], capture_output=True, text=True, check=True
        )
        assert done.stderr.startswith("{") == (log_format != "console")
        assert "\x1b" not in done.stderr  # colours are for terminals
    lines = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert [(line["event"], line["number"], line["component"]) for line in lines] == [("hello", 3, "x")] * 3
