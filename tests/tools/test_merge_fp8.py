"""An adapter that was trained on an FP8 base, merged onto what it was trained on: q * scale, once, plus the adapter."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from fastft import FastModel
from fastft.errors import AdapterError
from fastft.linear.float8_linear import float8_layers
from fastft.tools.export.source import find_source
from fastft.tools.merge.merge import check_merge, write_configs, write_merged
from fastft_kernels.quant.int8 import dequantize_e4m3

WIDTHS = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, vocab_size=96)
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the model in FP8 with its adapter, the base's folder, the adapter's)."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = LlamaConfig(**WIDTHS, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    model = FastModel.from_pretrained(base, load_in_fp8=True, peft_config=LORA)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(adapter)
    return model, base, adapter


def test_nothing_of_the_base_is_saved(trained):
    names = load_file(trained[2] / "adapter_model.safetensors").keys()
    assert len(names) == 4 and all(".lora_" in n for n in names)


def test_every_tensor(trained):
    """Layers without an adapter were in FP8 in training too. What is not a linear layer stays as it is stored."""
    model, base, adapter = trained
    source = find_source(adapter, precision="fp8")
    assert source.precision == "the base in fp8"
    merged = dict(t for path in source.plan.files for t in source.plan.tensors(path, torch.float32))
    stored = load_file(base / "model.safetensors")
    assert merged.keys() == stored.keys()
    layers = {id(m): n.removeprefix("base_model.model.") for n, m in model.named_modules()}
    seen = set()
    for m in float8_layers(model):
        name = layers[id(m)].removesuffix(".base_layer")
        want = dequantize_e4m3(m.weight.data, m.weight_scale_inv.data, torch.float32)
        lora = model.get_submodule(f"base_model.model.{name}")
        if hasattr(lora, "lora_A"):
            want = want + lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
        torch.testing.assert_close(merged[f"{name}.weight"], want.detach(), rtol=1e-6, atol=1e-6)
        assert (merged[f"{name}.weight"] - stored[f"{name}.weight"].float()).norm() > 0.01 * want.norm()
        seen.add(f"{name}.weight")
    assert len(seen) == 7
    assert all(torch.equal(merged[n], stored[n].float()) for n in stored.keys() - seen)


def test_the_folder_is_checked(trained, tmp_path):
    """Merged onto the original instead, it is not base + adapter as trained."""
    _, base, adapter = trained
    found, other = (find_source(adapter, precision=p).plan for p in ("fp8", "original"))
    for plan, name in ((found, "merged"), (other, "other")):
        (tmp_path / name).mkdir()
        write_merged(tmp_path / name, plan, torch.bfloat16)
        write_configs(base, adapter, tmp_path / name, torch.bfloat16, plan)
    assert check_merge(base, adapter, tmp_path / "merged", torch.bfloat16, found).ok
    assert not check_merge(base, adapter, tmp_path / "other", torch.bfloat16, found).ok


def test_the_choice_is_named(trained):
    with pytest.raises(AdapterError, match="original, nf4, fp4, fp8, got 'fp16'"):
        find_source(trained[2], precision="fp16")
