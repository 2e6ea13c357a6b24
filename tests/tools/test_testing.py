"""The parity fixture, as a user's own suite has it: imported, in a pytest process of its own."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import pytest, torch
from transformers import LlamaConfig, LlamaForCausalLM
from fastft.testing import assert_parity, parity

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
IDS = torch.arange(10)[None] * 5

@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))

def test_a_patched_model(model, parity):
    classes = [type(m) for m in model.modules()]
    assert parity(model, {"input_ids": IDS, "labels": IDS})
    assert [type(m) for m in model.modules()] == classes

def test_a_change_of_ones_own(model, parity):
    parity(model, {"input_ids": IDS, "labels": IDS}, lambda m: m)
    def wrong(m):
        m.model.norm.weight.data.mul_(1.001)
    with pytest.raises(AssertionError, match="patched and stock differ"):
        parity(model, {"input_ids": IDS, "labels": IDS}, wrong)
    assert torch.equal(model.model.norm.weight, torch.ones(32))

def test_that_fails(model, parity):
    parity(model, {"input_ids": IDS, "labels": IDS}, lambda m: m.model.norm.weight.data.mul_(1.001) and None)
"""


def test_a_suite_that_imports_the_fixture(tmp_path):
    (tmp_path / "test_mine.py").write_text(SUITE)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path / "test_mine.py"),
    ]
    root = str(Path(__file__).parent.parent.parent)
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root})
    assert "2 passed" in run.stdout and "1 failed" in run.stdout, run.stdout[-3000:]
    assert "test_that_fails" in run.stdout.split("short test summary")[1]


def test_importing_it_needs_no_pytest(monkeypatch):
    import fastft.testing

    monkeypatch.delitem(vars(fastft.testing), "parity", raising=False)
    monkeypatch.setitem(sys.modules, "pytest", None)
    again = importlib.reload(fastft.testing)
    assert again.assert_parity and "parity" in again.__all__
    with pytest.raises(ImportError):
        again.parity  # noqa: B018
