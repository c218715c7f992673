"""The threat model names a test for each threat, and each of them exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "docs" / "threat-model.md"


def list_tests(path: Path) -> set[str]:
    """Names of the test functions in a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def threat_rows() -> list[list[str]]:
    """The cells of each line of the tables."""
    lines = [line for line in MODEL.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in rows if row[0] != "threat"]


def test_each_threat_names_tests_that_exist() -> None:
    """Three cells a line, the last of them one or more tests of this repository."""
    rows = threat_rows()
    assert len(rows) >= 45
    for row in rows:
        assert len(row) == 3, row
        named = re.findall(r"`(tests/\S+?\.py)(?:::(\w+))?`", row[2])
        assert named, row[0]
        for file, test in named:
            path = ROOT / file
            assert path.is_file(), file
            assert not test or test in list_tests(path), f"{file} has no {test}"


def test_each_threat_test_is_in_the_model() -> None:
    """A test named after a threat that the model does not list is a threat somebody forgot to write down."""
    text = MODEL.read_text()
    for path in (ROOT / "tests" / "security").glob("test_*.py"):
        for test in list_tests(path):
            assert not test.startswith("test_threat_") or f"{path.relative_to(ROOT)}::{test}`" in text, test
