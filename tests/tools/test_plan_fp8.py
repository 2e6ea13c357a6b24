"""fastft plan of a base in FP8: an 8B model's bytes, one transposed weight at a time, and what the command says."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig
from typer.testing import CliRunner

import fastft
from fastft.cli import app
from fastft.errors import PlanError
from fastft.linear.float8_linear import Float8Linear
from fastft.tools.plan.predict import TrainingSetup, subject

LAYERS = 32
WIDTHS = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
LARGEST = 14336 * 4096  # elements of a layer's largest weight


def planned(fp8, vocab=128256, loss="trl"):
    config = LlamaConfig(**WIDTHS, num_hidden_layers=LAYERS, vocab_size=vocab)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    half = torch.bfloat16
    return subject(
        config,
        TrainingSetup(half, half, lora, torch.float32, False, "adamw_torch_fused", False, loss, True, fp8=fp8),
    )


def test_an_8b_model_at_4_x_2048():
    """Linear weights at 1.01 bytes an element, nothing more kept than in bf16, and a peak below bf16's by the weights
    alone."""
    bf16, fp8 = planned(False), planned(True)
    linears = [m for m in fp8.model.modules() if isinstance(m, Float8Linear)]
    assert len(linears) == 7 * len(fp8.pool)
    stored = sum(p.nbytes for m in linears for p in (m.weight, m.weight_scale_inv))
    elements = sum(m.weight.numel() for m in linears)
    assert stored <= 1.01 * elements
    assert fp8.kept((0, LAYERS), 4, 2048) <= bf16.kept((0, LAYERS), 4, 2048)
    assert fp8.kept((LAYERS, 0), 4, 2048) <= bf16.kept((LAYERS, 0), 4, 2048)
    a, b = (s.peak((0, LAYERS), 4, 2048) for s in (bf16, fp8))
    whole = elements * LAYERS // len(fp8.pool)
    assert a.parts["weights"] - b.parts["weights"] == pytest.approx(whole, rel=0.01)
    assert b.parts["activations"] <= a.parts["activations"]
    assert b.parts["temporary"] <= a.parts["temporary"] + LARGEST


def test_one_transposed_weight_at_a_time():
    """With few tokens and a small head, the backward's temporaries are the scratch: the largest weight once, and in
    bf16, which transposes nothing, none of it."""
    few = {"rows": 1, "tokens": 16}
    of = lambda fp8: next(
        p for p in planned(fp8, 64, "model").peaks((0, LAYERS), **few) if p.phase == "backward"
    ).parts["temporary"]
    assert of(False) < 0.1 * LARGEST
    assert LARGEST <= of(True) < 1.1 * LARGEST


def test_the_command(tmp_path):
    widths = dict(hidden_size=64, intermediate_size=256, num_attention_heads=2, vocab_size=64)
    config = LlamaConfig(**widths, num_hidden_layers=2)
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    line = ["plan", str(tmp_path), "--fp8", "--seq", "32", "--json"]
    found = json.loads(CliRunner().invoke(app, line).stdout)
    assert found["what"].startswith("FP8, LoRA r=16 in float32")
    assert any("stock has no FP8 like it" in n for n in found["notes"])
    weights = {x["stack"]: x["peak"]["parts"]["weights"] for x in found["lines"]}
    embeddings = 2 * 64 * 64 * 2
    assert weights["stock"] - embeddings > 1.8 * (weights["fastft"] - embeddings)


@pytest.mark.parametrize(
    ("other", "says"), [({"full": True}, "weights in FP8 cannot be trained"), ({"load_in_4bit": True}, "choose one")]
)
def test_what_cannot_be_both(other, says):
    with pytest.raises(PlanError, match=says):
        fastft.plan(LlamaConfig(), load_in_fp8=True, **other)
