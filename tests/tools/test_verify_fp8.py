"""fastft verify --fp8: patched against its specification, and the step beside bf16 and NF4; a base that is rounded
wrongly is told."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from fastft.cli import app
from fastft.errors import QuantizationError
from fastft.linear import float8_linear
from fastft.tools.verify.checkpoint import verify_checkpoint
from fastft.tools.verify.precisions import compare_precisions

WIDTHS = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, vocab_size=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(**WIDTHS, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return str(path)


def test_the_command(folder):
    run = CliRunner().invoke(app, ["verify", folder, "--fp8", "--seq", "12", "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.output[run.output.index("{\n") :])
    assert found["ok"] and found["precisions"]["ok"] and found["precisions"]["reference"] == "float64"
    assert any("FP8" in line["kernel"] or line["group"].startswith("linear group") for line in found["lines"])
    of = {line["precision"]: line for line in found["precisions"]["lines"]}
    assert list(of) == ["bf16", "FP8", "NF4"]
    assert of["bf16"]["cosine"] == pytest.approx(1, abs=1e-12)
    assert of["NF4"]["cosine"] < of["FP8"]["cosine"] < 0.9999999
    assert of["bf16"]["error"] < of["FP8"]["error"] < of["NF4"]["error"]


def test_weights_rounded_wrongly(folder, monkeypatch):
    """Planted: the scale of each row is that of the next."""
    real = float8_linear.quantize_e4m3_rows

    def of_the_next(w, columns=None):
        q, scale = real(w)
        return q, scale.roll(1, 0)

    monkeypatch.setattr(float8_linear, "quantize_e4m3_rows", of_the_next)
    found = verify_checkpoint(folder, fp8=True, seq=12)
    assert not found and not found.precisions
    assert "FP8's gradients are further from the reference than NF4's" in str(found)


def test_figures_of_a_comparison():
    """By hand: gradients at 60 degrees, and an error of the difference's length."""
    grads = {"bf16": [1.0, 0.0], "FP8": [0.5, 0.75**0.5], "NF4": [-1.0, 0.0]}
    which = {"load_in_fp8": "FP8", "load_in_4bit": "NF4"}
    step = lambda name: {
        "loss": torch.tensor([{"bf16": 2.0, "FP8": 2.5, "NF4": 3.0}[name], 9.0]),
        "m.q_proj.lora_A.default.weight": torch.tensor(grads[name]),
        "m.o_proj.lora_A.default.weight": torch.tensor([0.0, 2.0]),
    }
    load = lambda **how: next((which[k] for k in how), "bf16")
    found = compare_precisions(load, step, lambda model: None)
    bf16, fp8, nf4 = found.lines
    assert found and found.reference == "bf16"
    assert (bf16.loss, fp8.loss, nf4.loss) == (2.0, 2.5, 3.0)
    assert fp8.cosine == pytest.approx(4.5 / 5) and nf4.cosine == pytest.approx(3 / 5)
    assert fp8.error == pytest.approx(5**-0.5) and nf4.error == pytest.approx(2 * 5**-0.5) and bf16.error == 0
    assert fp8.worst == ("q_proj", pytest.approx(0.5)) and nf4.worst == ("q_proj", pytest.approx(-1))
    grads["FP8"], grads["NF4"] = grads["NF4"], grads["FP8"]
    assert not compare_precisions(load, step, lambda model: None)


def test_what_cannot_be_both(folder):
    for other in ({"four_bit": True}, {"lora": False}):
        with pytest.raises(QuantizationError, match="were both given: choose"):
            verify_checkpoint(folder, fp8=True, **other)
