"""The guides: links lead somewhere, code is Python, and what is called fastft's exists."""

import ast
import re
import textwrap
from pathlib import Path

import pytest

import fastft
from fastft import errors
from fastft.cli import app
from fastft.loading.fast_model import FastModel

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "MIGRATING.md", ROOT / "notebooks" / "README.md"]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")


@pages
def test_links_lead_somewhere(page):
    links = [x for x in re.findall(r"\]\(([^)#]+)", page.read_text()) if not x.startswith("http")]
    assert links
    assert [x for x in links if not (page.parent / x).exists()] == []


@pages
def test_names_exist(page):
    text = page.read_text()
    for name in re.findall(r"\bfastft\.(\w+)\(", text):
        assert hasattr(fastft, name), name
    for name in re.findall(r"\b(\w+Error)\b", text):
        assert hasattr(errors, name), name
    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert set(re.findall(r"`fastft (\w+)", text)) <= commands


def test_diffs_are_python_before_and_after():
    diffs = re.findall(r"^```diff\n(.*?)^```", (ROOT / "docs" / "MIGRATING.md").read_text(), flags=re.M | re.S)
    assert len(diffs) == 4
    for diff in diffs:
        for sign in "-+":
            ast.parse(
                textwrap.dedent(
                    "\n".join(line[1:] for line in diff.splitlines() if line[0] in (sign, " ")).replace(", ...)", ")")
                )
            )
        assert sum(line.startswith("+") for line in diff.splitlines()) <= 3


def test_arguments_of_the_diffs_are_fastfts():
    takes = FastModel.from_pretrained.__annotations__
    tree = re.findall(
        r"FastModel\.from_pretrained\(name, (.*)\)$", (ROOT / "docs" / "MIGRATING.md").read_text(), flags=re.M
    )
    calls = [ast.parse(f"f({arguments})", mode="eval").body for arguments in tree]
    assert len(calls) == 2
    assert {k.arg for call in calls for k in call.keywords} <= set(takes)


def test_every_notebook_is_listed():
    for name in (p.name for p in (ROOT / "notebooks").glob("*.ipynb")):
        assert all(name in (ROOT / page).read_text() for page in ("README.md", "notebooks/README.md")), name
