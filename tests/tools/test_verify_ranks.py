"""`fastft verify --nproc`: the command, its table, how processes are started, and what names a fault. Whole runs are in
tests/distributed."""

import json
import os
import signal

import pytest
import torch
from typer.testing import CliRunner

from fastft.cli import app
from fastft.tools.verify.ranks import runner
from fastft.tools.verify.ranks.batches import draw, part, tokens_of
from fastft.tools.verify.ranks.diagnosis import named, of_average
from fastft.tools.verify.ranks.job import Line
from fastft.tools.verify.ranks.launch import ProcessFailedError, launched
from fastft.tools.verify.ranks.runner import RankVerification
from fastft.tools.verify.ranks.saving import difference
from tests.distributed.models import make
from tests.tools import processes


def test_a_process_that_fails_is_named(capfd):
    """Each is given its rank as torchrun gives it; the launcher's signal handlers, variables and words go with it."""
    before, handlers = dict(os.environ), [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ProcessFailedError, match=r"rank 1 of 2 ended with ValueError: planted in 1 of 2$") as e:
        launched(processes.second_raises, 2)
    assert e.value.exit_code == 1
    assert dict(os.environ) == before
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert capfd.readouterr() == ("", "")  # what processes print is no part of what the command prints


def test_the_command(monkeypatch):
    """JSON alone on stdout; exit code 1 where a line fails; mistakes are one line."""
    line = dict(name="saved as trained", ok=False, detail="rank 0: its file lacks x")
    found = {"model": "M", "dtype": "float32", "lines": [Line(**line)], "notes": ["a note"]}
    monkeypatch.setattr(runner, "launched", lambda *a: [found, found])
    run = CliRunner().invoke(app, ["verify", "folder", "--nproc", "2", "--strategy", "fsdp2", "--json"])
    assert run.exit_code == 1
    shown = json.loads(run.stdout)
    assert not shown["ok"] and (shown["strategy"], shown["nproc"]) == ("fsdp2", 2)
    assert shown["lines"] == [line | {"error": None, "stock_error": None}]
    run = CliRunner().invoke(app, ["verify", "folder", "--nproc", "2"])
    assert run.exit_code == 1 and "failed: saved as trained: rank 0: its file lacks x" in run.stdout
    found["lines"] = [Line("loss", True, "", 1e-7, 2e-7)]
    assert CliRunner().invoke(app, ["verify", "folder", "--nproc", "2"]).exit_code == 0
    run = CliRunner().invoke(app, ["verify", "folder", "--nproc", "2", "--strategy", "pipeline"])
    assert run.exit_code != 0 and "want one of ddp, fsdp2, zero2, zero3" in str(run.exception)
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    run = CliRunner().invoke(app, ["verify", "folder", "--nproc", "2", "--strategy", "zero3"])
    assert run.exit_code != 0 and str(run.exception).endswith("pip install --no-build-isolation deepspeed")
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    run = CliRunner().invoke(app, ["verify", "folder", "--nproc", "2"])
    assert run.exit_code != 0 and "wants as many GPUs, this machine has 1" in str(run.exception)


def test_nothing_compared_is_no_pass():
    assert not RankVerification("M", "float32", "ddp", 2, ())


def test_parts_are_the_whole_and_of_different_lengths():
    base = make("llama-full")
    whole = draw(base, 6, 12, 0)
    parts = [part(whole, i, 3) for i in range(3)]
    assert torch.equal(torch.cat([p["input_ids"] for p in parts]), whole["input_ids"])
    counts = [tokens_of(p) for p in parts]
    assert counts[0] > counts[1] > counts[2] > 0 and sum(counts) == tokens_of(whole)
    assert not torch.equal(whole["input_ids"], draw(base, 6, 12, 1)["input_ids"])


def test_what_is_wrong_with_an_average_is_told():
    g = torch.Generator().manual_seed(0)
    parts = [{n: torch.randn(40, generator=g).double() for n in "ab"} for _ in range(2)]
    mix = lambda *times: {n: sum(t * p[n] for t, p in zip(times, parts)).float() for n in "ab"}
    tokens = (30, 10)
    told = lambda *times: of_average(mix(*times), parts, tokens)
    assert told(1, 1) == "" and told(1.001, 0.999) == ""
    assert "an unscaled average" in told(40 / 60, 40 / 20) and "rank 1's rows count 2.00 times" in told(2 / 3, 2)
    assert told(0.5, 0.5).startswith("every gradient is 0.5 times")
    assert "rank 1's rows count 0.00 times" in told(1, 0) and "not averaged by tokens" in told(1, 0)
    noise = {n: torch.randn(40, generator=g) for n in "ab"}
    assert of_average(noise, parts, tokens) == ""  # no sum of the parts: something else is wrong
    assert named([[], []]) == "" and named([[], ["x", "y"]]).startswith("rank 1 computes with a stale weight")


def test_what_is_wrong_with_a_file_is_told():
    want = {"a": torch.ones(4, 2), "b": torch.zeros(3)}
    assert difference(want, {k: v.clone() for k, v in want.items()}, "it") == ""
    assert difference(want, {"a": torch.ones(2, 2), "b": want["b"]}, "it") == (
        "it has a slice of a: [2, 2] instead of [4, 2]"
    )
    assert "it has nothing of a" in difference(want, {"a": torch.ones(0), "b": want["b"]}, "it")
    assert difference(want, {"a": want["a"]}, "it") == "it lacks b"
    assert "it has other values of b, up to 1.0e+00 apart" in difference(want, want | {"b": torch.ones(3)}, "it")
    assert difference(want, want | {"c": torch.ones(1)}, "it") == "it has c, which does not train"
