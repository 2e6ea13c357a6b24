"""FastModel.from_pretrained(load_in_fp8=...): what is quantised and what is not, the adapter's bits, checkpoints that
are in FP8 already, and training to the end."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import fastft
from fastft import FastModel, errors
from fastft.linear.float8_linear import Float8Linear, float8_layers
from fastft.loading import fp8
from fastft.loading.float8_saving import see_to_saving
from fastft_kernels.quant.fp8 import quantize_e4m3_blocks, quantize_e4m3_rows
from fastft_kernels.quant.int8 import dequantize_e4m3
from tests.model.test_loading import TEXT, one_line, stock

BLOCK = (128, 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**TEXT), dtype=torch.bfloat16).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def in_fp8(folder, tmp_path_factory):
    """The same in transformers' fine-grained FP8: blocks of 128 x 128."""
    path = tmp_path_factory.mktemp("fp8")
    tensors = {}
    for name, t in load_file(f"{folder}/model.safetensors").items():
        if name.endswith("proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_e4m3_blocks(t, BLOCK)
        else:
            tensors[name] = t
    save_file(tensors, f"{path}/model.safetensors", {"format": "pt"})
    config = json.loads(Path(folder, "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": list(BLOCK),
        "activation_scheme": "dynamic",
    }
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def fast(folder, **kwargs):
    torch.manual_seed(7)
    return FastModel.from_pretrained(folder, **kwargs)


def ids():
    return torch.arange(24).view(2, 12) % TEXT["vocab_size"]


def trains(model, steps=4):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def quantised(dense, block):
    return quantize_e4m3_rows(dense) if block is None else quantize_e4m3_blocks(dense, block)


@pytest.mark.parametrize(("asked", "block"), [(True, None), ("rows", None), ("blocks", BLOCK)])
def test_a_dense_checkpoint(folder, asked, block):
    """Every linear layer but the head, by its own values; the adapter and all else are the stock script's bits."""
    ours, theirs = fast(folder, load_in_fp8=asked), stock(folder)
    assert len(float8_layers(ours)) == 14
    mine, dense = ours.state_dict(), theirs.state_dict()
    scales = [n for n in mine if n.endswith("weight_scale_inv")]
    assert len(scales) == 14 and set(mine) - set(scales) == set(dense)
    for name, t in dense.items():
        if f"{name}_scale_inv" in mine:
            q, scale = quantised(t, block)
            assert torch.equal(mine[name].view(torch.uint8), q.view(torch.uint8)), name
            assert torch.equal(mine[f"{name}_scale_inv"], scale), name
        else:
            assert mine[name].dtype == t.dtype and torch.equal(mine[name], t), name
    assert type(ours.get_output_embeddings()) is not Float8Linear
    report = [r for r in fastft.report(ours) if r.kind == "linear group"]
    assert sum(r.count for r in report if r.is_swapped) == 14 and all("FP8" in r.reason for r in report)
    said = lambda: [n for n in fastft.report(ours).notes if "rounded to zero" in n]
    assert not said()
    losses = trains(ours)
    assert losses[-1] < losses[0]
    assert len(said()) == (block is None)  # made dense, nothing of a gradient is rounded to FP8


@pytest.mark.parametrize("config", [None, LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["norm"])])
def test_what_learns_stays_dense(folder, config):
    """A bare model is frozen in FP8; what an adapter trains, and the head that it adapts, are not quantised."""
    model = fast(folder, load_in_fp8=True, peft_config=config)
    layers = float8_layers(model)
    assert len(layers) == 14 and not any(p.requires_grad for m in layers for p in m.parameters())
    if config is None:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        fastft.patch(model)
        assert sum(r.count for r in fastft.report(model) if r.kind == "linear group" and r.is_swapped) == 14
    assert trains(model)


def test_an_adapter_is_saved_and_found_again(folder, tmp_path):
    model = fast(folder, load_in_fp8=True, fp8_backward="bf16")
    assert {m.products for m in float8_layers(model)} == {"forward"}
    trains(model, 2)
    model.save_pretrained(tmp_path)
    again = FastModel.from_pretrained(tmp_path, load_in_fp8=True, fp8_backward="bf16")
    with torch.no_grad():
        assert torch.equal(model.eval()(ids()).logits, again.eval()(ids()).logits)
    assert len(float8_layers(again)) == 14 and any(p.requires_grad for p in again.parameters())


def test_a_checkpoint_in_fp8(in_fp8, folder):
    """Without FP8 units transformers makes it dense: its values come back, as far as bfloat16 holds their scales."""
    model = fast(in_fp8, load_in_fp8=True)
    stored = load_file(f"{in_fp8}/model.safetensors")
    layers = {n.removeprefix("base_model.model.").removesuffix(".base_layer"): m for n, m in model.named_modules()}
    found = {n: m for n, m in layers.items() if isinstance(m, Float8Linear)}
    assert len(found) == 14
    for name, m in found.items():
        assert m.block == BLOCK and m.products == "both"
        assert torch.equal(m.weight.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8))
        scale = stored[f"{name}.weight_scale_inv"]
        assert ((m.weight_scale_inv - scale).abs() <= scale * 2.0**-8).all()
    losses = trains(model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("asked", ["rows", "blocks"])
def test_a_bare_base_is_saved_dense(folder, tmp_path, asked):
    """What stock loads from it is the matrix of each layer; the model that was saved is as it was."""
    model = fast(folder, load_in_fp8=asked, peft_config=None)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert all(torch.equal(t.view(torch.uint8), before[n].view(torch.uint8)) for n, t in model.state_dict().items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16 and set(again.state_dict()) < set(before)
    assert not hasattr(again.config, "quantization_config")
    for name, t in again.state_dict().items():
        q = before[name]
        if f"{name}_scale_inv" in before:
            q = dequantize_e4m3(q, before[f"{name}_scale_inv"], torch.bfloat16, BLOCK if asked == "blocks" else None)
        assert torch.equal(t, q), name
    with pytest.raises(errors.QuantizationError) as e:
        model.dequantize()
    assert "load again without load_in_fp8" in one_line(e)


@pytest.fixture
def with_units(monkeypatch):
    """transformers keeps a checkpoint in FP8, as where there are FP8 units."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)


def test_a_checkpoint_in_fp8_is_trained_as_it_comes(in_fp8, with_units, tmp_path):
    """Where transformers keeps it in FP8: the stored bits and nothing beside them, from loading to both ways of
    saving."""
    stored = load_file(f"{in_fp8}/model.safetensors")
    same = lambda a, b: a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    model = fast(in_fp8, load_in_fp8=True)
    assert len(float8_layers(model)) == 14
    losses = trains(model)
    assert losses[-1] < losses[0]
    assert sum(r.count for r in fastft.report(model) if r.kind == "linear group" and r.is_swapped) == 14
    name = lambda n: n.removeprefix("base_model.model.").replace(".base_layer", "")
    kept = {name(n): p for n, p in model.named_parameters() if not p.requires_grad}
    assert kept.keys() == stored.keys() and all(same(t, stored[n]) for n, t in kept.items())
    model.save_pretrained(tmp_path / "adapter")
    again = FastModel.from_pretrained(tmp_path / "adapter", load_in_fp8=True)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids()).logits, again.eval()(ids()).logits)

    fast(in_fp8, load_in_fp8=True, peft_config=None).save_pretrained(tmp_path / "bare")
    written = load_file(tmp_path / "bare" / "model.safetensors")
    assert written.keys() == stored.keys() and all(same(t, stored[n]) for n, t in written.items())
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "bare").model.layers[0].mlp.up_proj) is FP8Linear


def test_one_scale_a_weight_is_not_saved(in_fp8, with_units, tmp_path):
    """Scales are kept by row here: what transformers would write is not what it reads."""
    model = AutoModelForCausalLM.from_pretrained(in_fp8)
    for m in model.modules():
        if type(m) is FP8Linear:
            m.weight_scale_inv, m.block_size = nn.Parameter(m.weight_scale_inv[0, 0], requires_grad=False), None
    fp8.take_float8(model, "both")
    see_to_saving(model)
    with pytest.raises(errors.QuantizationError) as e:
        model.save_pretrained(tmp_path)
    assert "copy the folder" in one_line(e)


@pytest.mark.parametrize("block", [BLOCK, None])
def test_transformers_layers_are_taken_as_they_come(block):
    """Where transformers keeps them in FP8: the same storage, no copy."""
    w = torch.randn(48, 64)
    layer = FP8Linear(64, 48, block_size=block, has_bias=True)
    if block is None:
        scale = w.abs().max() / 448
        layer.weight = nn.Parameter((w / scale).to(torch.float8_e4m3fn), requires_grad=False)
        layer.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    else:
        q, scale = quantize_e4m3_blocks(w, block)
        layer.weight, layer.weight_scale_inv = (nn.Parameter(t, requires_grad=False) for t in (q, scale))
    nn.init.normal_(layer.bias)
    pointer = layer.weight.data_ptr()
    assert fp8.take_float8(nn.Sequential(layer, nn.Linear(4, 4, dtype=torch.bfloat16)), "both") == 1
    assert type(layer) is Float8Linear and layer.weight.data_ptr() == pointer
    assert layer.compute_dtype == torch.bfloat16
    if block is not None:
        assert layer.weight_scale_inv.data_ptr() == scale.data_ptr()
    x = torch.randn(5, 64)
    dense = dequantize_e4m3(layer.weight.data, layer.weight_scale_inv.data, torch.float32, block)
    y = nn.functional.linear(x, dense, layer.bias)
    assert (layer(x) - y).norm() <= (1e-6 if block else 0.05) * y.norm()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"load_in_fp8": "columns"}, 'want True or "rows"'),
        ({"load_in_fp8": True, "load_in_4bit": True}, "load_in_fp8 and load_in_4bit were both given"),
        ({"load_in_fp8": True, "fp8_backward": "fp16"}, 'want "fp8" or "bf16"'),
        ({"fp8_backward": "bf16"}, "without load_in_fp8=True"),
        ({"load_in_fp8": True, "quantization_config": {"load_in_4bit": True}}, "quantization_config were both given"),
    ],
)
def test_mistakes(folder, given, text):
    with pytest.raises(errors.QuantizationError) as e:
        FastModel.from_pretrained(folder, **given)
    assert text in one_line(e)


def test_other_quantised_checkpoints(folder):
    config = LlamaConfig(**TEXT, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(errors.QuantizationError) as e:
        FastModel.from_pretrained(folder, load_in_fp8=True, config=config)
    assert "quantised already (gptq)" in one_line(e)


def test_weights_that_are_elsewhere(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).to("meta")
    with pytest.raises(errors.QuantizationError) as e:
        fp8.quantise(model, fp8.linears_of(model), fp8.Float8Request(None, "both"), None)
    assert "needs the weights here" in one_line(e)


def test_nobody_asked(in_fp8, folder):
    assert not float8_layers(fast(folder)) and not float8_layers(fast(in_fp8))
