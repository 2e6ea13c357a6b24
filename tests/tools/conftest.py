"""Tiny trained models for the exports, made when first asked for and shared by all tests of a process; commands run in
this process."""

import sys

import pytest

from fastft.cli import main
from tests.tools import export_models


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained(family) -> (base's folder, adapter's folder)."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            base = export_models.make_base(family, folder / f"{family}-base")
            adapter = export_models.make_adapter(
                base,
                folder / f"{family}-adapter",
                export_models.STEPS.get(family, export_models.USUAL)[1],
                **export_models.ADAPTERS[family],
            )
            made[family] = base, adapter
        return made[family]

    return make


@pytest.fixture
def command(monkeypatch, capfd):
    """(exit code, lines on stderr) of a command, as its entry point ends."""

    def run(*args):
        capfd.readouterr()  # what making a model said
        monkeypatch.setattr(sys, "argv", ["fastft", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, [x for x in capfd.readouterr().err.splitlines() if x]

    return run
