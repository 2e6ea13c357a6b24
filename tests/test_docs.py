"""The guides: links and paths lead somewhere, code is Python, and what is called fastft's exists."""

import ast
import builtins
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import fastft
import fastft_kernels
from fastft import errors
from fastft.cli import app
from fastft.loading.fast_model import FastModel
from fastft.testing import assert_parity

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "notebooks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TOP = ("fastft", "fastft_kernels", "tests", "docs", "benchmarks", "notebooks", ".ci")
BASES = [ROOT, ROOT / "fastft", ROOT / "fastft_kernels", ROOT / "docs"]  # what a page's paths start from
WRITTEN = {"adapter/"}  # by a reader's own run
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")


@pages
def test_links_lead_somewhere(page):
    links = [x for x in re.findall(r"\]\(([^)#]+)", page.read_text()) if not x.startswith("http")]
    assert links or page.name not in ("README.md", "MIGRATING.md", "ARCHITECTURE.md")
    assert [x for x in links if not (page.parent / x).exists()] == []


@pages
def test_names_exist(page):
    text = page.read_text()
    for name in re.findall(r"\bfastft\.(\w+)\(", text):
        assert hasattr(fastft, name), name
    for name in re.findall(r"\b(\w+Error)\b", text) if page.name != "MODELS.md" else ():  # what stock raised
        assert hasattr(errors, name) or hasattr(builtins, name), name
    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert set(re.findall(r"`fastft (\w+)", text)) <= commands


def quoted(text: str) -> list[str]:
    """What stands in backticks, code blocks apart."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def missing_paths(text: str) -> list[str]:
    """Paths in backticks that lead nowhere, and names behind a path's colon (`api.py: patch`) that are not in it."""
    wrong = []
    for whole in quoted(text):
        path, _, name = whole.partition(": ")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", path):
            continue
        is_ours = "/" in path and path.split("/")[0] in TOP
        if path in WRITTEN or not (is_ours or path.endswith(("/", ".py", ".md", ".toml", ".txt"))):
            continue
        if "/" in path:
            found = [base / path for base in BASES if (base / path).exists()]
        else:  # a file by its name alone: one of that name, in any folder
            found = [*ROOT.glob(path), *(f for top in TOP for f in (ROOT / top).glob(f"**/{path}"))]
        if not any(not name or (f.is_file() and re.search(rf"\b{name}\b", f.read_text())) for f in found):
            wrong.append(whole)
    return wrong


def missing_modules(text: str) -> list[str]:
    """Dotted names of ours in backticks, or after `python -m`, that cannot be found."""
    wrong = []
    names = [m for q in quoted(text) for m in re.findall(r"^((?:fastft|fastft_kernels|benchmarks)(?:\.\w+)+)", q)]
    for name in [*names, *re.findall(r"python -m (benchmarks(?:\.\w+)+)", text)]:
        module, *rest = name.split(".")
        found = importlib.import_module(module)
        while rest:
            module = f"{module}.{rest[0]}"
            place = ROOT.joinpath(*module.split("."))
            if place.is_dir() or place.with_suffix(".py").exists():
                found = None if module.startswith("benchmarks") else importlib.import_module(module)
            elif hasattr(found, rest[0]):
                found = getattr(found, rest[0])
            else:
                wrong.append(name)
                break
            rest = rest[1:]
    return wrong


@pages
def test_paths_and_modules_exist(page):
    assert missing_paths(page.read_text()) == []
    assert missing_modules(page.read_text()) == []


def test_a_dead_path_is_seen():
    good = "`norm/norms.py` `fastft/norm` `lm_head/` `api.py: patch` `KERNELS.md` `train.py a` `and/or` `docs/`"
    bad = ["norm/norm.py", "fastft/norms", "heads/", "api.py: patches", "KERNEL.md", "tests/none", "lost.py"]
    assert missing_paths(good + "".join(f" `{b}`" for b in bad)) == bad
    good = "`fastft.plan(...)` `fastft.testing.parity` `fastft_kernels.compare` `benchmarks.cpu`"
    bad = ["fastft.plans", "fastft_kernels.norm.rms", "benchmarks.none"]
    assert missing_modules(good + "".join(f" `{b}`" for b in bad)) == bad
    assert missing_modules("    python -m benchmarks.none --tiny") == ["benchmarks.none"]


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


PUBLIC = {n: f for m in (fastft, fastft_kernels) for n in m.__all__ if inspect.isfunction(f := getattr(m, n))}
PUBLIC |= {"FastModel.from_pretrained": FastModel.from_pretrained, "assert_parity": assert_parity}


def undocumented(text: str, arguments: list[str]) -> list[str]:
    """The sections that a public function's docstring lacks, and the arguments that its section leaves out."""
    sections = re.split(r"^(Args|Returns|Raises):$", text, flags=re.M)
    missing = [name for name in ("Args", "Returns", "Raises") if name not in sections[1::2]]
    if missing:
        return missing
    entries = re.findall(r"^    (\S[^:]*):", dict(zip(sections[1::2], sections[2::2]))["Args"], flags=re.M)
    named = {n for entry in entries for n in re.findall(r"\w+", entry)}
    return [a for a in arguments if a not in named]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_say_what_they_take_return_and_raise(name):
    signature = inspect.signature(PUBLIC[name]).parameters.values()
    arguments = [p.name for p in signature if p.kind is not p.VAR_KEYWORD]
    assert undocumented(inspect.getdoc(PUBLIC[name]), arguments) == []


def test_a_missing_section_is_seen():
    text = "Adds.\n\nArgs:\n    x, y: numbers,\n        any z: of them.\n\nReturns:\n    Their sum.\n"
    assert undocumented(text, ["x"]) == ["Raises"]
    assert undocumented(text + "\nRaises:\n    TypeError: they are none.", ["x", "y", "z"]) == ["z"]
