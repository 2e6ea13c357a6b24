"""`fastft verify --nproc 2` as it is typed: it starts its processes itself."""

import json

import pytest
from typer.testing import CliRunner

from fastft.cli import app
from fastft.tools.verify.ranks import runner
from tests.distributed.models import make
from tests.distributed.plants import unscaled_process

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model's."""
    where = tmp_path_factory.mktemp("llama") / "model"
    make("llama-full").save_pretrained(where)
    return str(where)


def test_it_passes(folder, capfd):
    run = CliRunner().invoke(app, ["verify", folder, "--nproc", "2", "--seq", "16", "--strategy", "fsdp2", "--json"])
    assert run.exit_code == 0, run.output
    shown = json.loads(run.stdout)
    assert shown["ok"] and len(shown["lines"]) == 9 and shown["strategy"] == "fsdp2"
    assert capfd.readouterr().out == ""  # nor do the processes print


def test_a_fault_ends_in_exit_code_1_and_is_named(folder, monkeypatch):
    monkeypatch.setattr(runner, "main", unscaled_process)
    run = CliRunner().invoke(app, ["verify", folder, "--nproc", "2", "--seq", "16"])
    assert run.exit_code == 1
    assert "FAIL" in run.stdout and "an unscaled average" in run.stdout


def test_a_model_that_is_not_there_is_one_line():
    run = CliRunner().invoke(app, ["verify", "./nowhere", "--nproc", "2"])
    assert (
        str(run.exception) == "there is no folder './nowhere': give a model's or adapter's folder, or a name on the Hub"
    )
