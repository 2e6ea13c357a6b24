"""tests/CONTRACT.md names for every behaviour the tests that hold it: they exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
SECTIONS = ["Adapters", "Parameters change under you", "Autograd", "Checkpointing", "Precision", "Models", "Python"]


def named(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`([\w/]+\.py)::(test_\w+)`", text)


def defined(path: Path) -> set[str]:
    """Tests of a file that run: functions of the module, unless a decorator skips them."""
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and not any("skip" in ast.unparse(d) or "xfail" in ast.unparse(d) for d in node.decorator_list)
    }


def test_every_behaviour_has_tests_that_exist() -> None:
    text = (TESTS / "CONTRACT.md").read_text()
    assert re.findall(r"^## (.+)$", text, re.M) == SECTIONS
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| behaviour")]
    assert len(rows) > 70 and all(named(row) for row in rows), [row for row in rows if not named(row)]
    files = {file: defined(TESTS / file) for file, _ in named(text)}
    missing = [f"{file}::{test}" for file, test in named(text) if test not in files[file]]
    assert not missing, missing


def test_a_test_that_is_gone_is_seen() -> None:
    assert "test_no_such_test" not in defined(Path(__file__)) and named("`a/b.py::test_c`, `d.py::test_e`") == [
        ("a/b.py", "test_c"),
        ("d.py", "test_e"),
    ]
