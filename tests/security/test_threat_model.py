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
    """The cells of each line of the tables: id, threat, mitigation, tests."""
    lines = [line for line in MODEL.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in rows if row[0] != "id"]


def named_tests(row: list[str]) -> list[tuple[str, str]]:
    """(file, function) of the tests that a line names."""
    return re.findall(r"`(tests/\S+?\.py)::(\w+)`", row[3])


def test_each_threat_has_a_test_of_its_name() -> None:
    """A line's first test is ``test_threat_ID``, the others begin so; all are functions of files in tests/security."""
    rows = threat_rows()
    assert len(rows) >= 50
    ids = [row[0] for row in rows]
    assert len(set(ids)) == len(ids)
    for row in rows:
        assert len(row) == 4, row
        tests = named_tests(row)
        assert tests, row
        assert row[3].count("`") == 2 * len(tests), f"{row[0]}: something that is no test"
        assert tests[0][1] == f"test_threat_{row[0]}"
        for file, name in tests:
            assert file.startswith("tests/security/"), file
            assert name == tests[0][1] or name.startswith(f"{tests[0][1]}_"), (row[0], name)
            assert (ROOT / file).is_file(), file
            assert name in list_tests(ROOT / file), f"{file} has no {name}"


def test_each_threat_test_has_its_line() -> None:
    """A test named after a threat is named by exactly one line; else somebody forgot to write the threat down."""
    named = [f"{file}::{name}" for row in threat_rows() for file, name in named_tests(row)]
    assert len(set(named)) == len(named)
    there = {
        f"{path.relative_to(ROOT)}::{name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in list_tests(path)
        if name.startswith("test_threat_")
    }
    assert there == set(named)
