"""fastft verify passes on real families and, with a planted 0.1% error in one kernel, fails and names the group."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig, Qwen3Config
from typer.testing import CliRunner

import fastft
from fastft.cli import app
from fastft.patching.patcher import record_of
from fastft.testing import assert_parity

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma2": Gemma2Config, "granite": GraniteConfig}


def build(family="llama", lora=True, **sizes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**SIZES | sizes), attn_implementation="eager")
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1))
        for n, p in model.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass(family):
    result = fastft.verify(build(family), seq=12)
    assert result, str(result)
    assert {"module", "model"} <= {x.level for x in result.lines} and len({x.group for x in result.lines}) >= 4
    json.dumps(result.to_dict())


def test_a_planted_error_fails_and_is_named(monkeypatch):
    from fastft.norm import norms

    model, other = fastft.patch(build()), fastft.patch(build().eval())
    real = norms.rms_norm_with_rstd
    monkeypatch.setattr(
        norms, "rms_norm_with_rstd", lambda x, *a, **k: (real(x, *a, **k)[0] * 1.001, real(x, *a, **k)[1])
    )
    result = fastft.verify(model, seq=12)
    assert not result
    assert {x.group.split(":")[0] for x in result.failed if x.level == "module"} == {"norm"}
    assert record_of(model) is not None
    with pytest.raises(AssertionError, match="patched and stock differ"):
        assert_parity(build().eval(), other, dict(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]))


def test_parity_of_two_models():
    ids = torch.randint(0, 96, (2, 10))
    stock, ours = build(lora=False), fastft.patch(build(lora=False))
    assert_parity(stock, ours, {"input_ids": ids, "labels": ids})


def test_the_command(tmp_path):
    build(lora=False).save_pretrained(tmp_path / "m")
    run = CliRunner().invoke(app, ["verify", str(tmp_path / "m"), "--seq", "8", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output[run.output.index("{\n") :])["ok"]
