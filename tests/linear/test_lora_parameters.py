"""Parameters that change under the patched model: what the next forward computes is what stock would compute with
them."""

import copy

import pytest
import torch
from torch import nn

import fastft
from tests.linear.lora_models import (
    BASES,
    both,
    dense,
    fallbacks,
    gradients,
    in_float64,
    judge,
    nf4,
    run,
    same_bits,
    tokens,
    train_step,
)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("base", BASES)
def test_adapters_cast_by_a_trainer(base):
    """TRL swaps `.data` of every trainable parameter of a quantised model for bfloat16."""

    def cast(model):
        for p in trainable(model):
            p.data = p.data.to(torch.bfloat16)

    model = both(lambda: BASES[base](torch.bfloat16), after=cast)
    assert all(g.dtype == torch.bfloat16 for g in gradients(model).values())


@pytest.mark.parametrize("base", BASES)
def test_parameter_replaced_by_setattr(base):
    def replace(model):
        g = torch.Generator().manual_seed(3)
        for m in model.modules():
            if hasattr(m, "lora_A") and "default" in m.lora_A:
                a = m.lora_A["default"]
                a.weight = nn.Parameter(torch.randn(a.weight.shape, generator=g) * 0.2)

    both(BASES[base], after=replace)


def test_base_weight_replaced_and_changed_in_place():
    def change(model):
        g = torch.Generator().manual_seed(3)
        for m in model.modules():
            if hasattr(m, "lora_A"):
                m.base_layer.weight.data.mul_(0.5)
                if m.out_features == 16:
                    m.base_layer.weight = nn.Parameter(
                        torch.randn(m.base_layer.weight.shape, generator=g) * 0.2, requires_grad=False
                    )

    both(dense, after=change)


def test_4bit_weight_replaced():
    """Another quantised weight in the place of the old one, of another blocksize too."""
    import bitsandbytes as bnb

    def change(model):
        for m in model.modules():
            if hasattr(m, "lora_A") and m.out_features == 128:
                w = torch.randn(128, 64, generator=torch.Generator().manual_seed(3)) * 0.2
                m.base_layer.weight = bnb.nn.Params4bit(
                    w, requires_grad=False, quant_type="nf4", blocksize=32, module=m.base_layer
                ).to("cpu")
                m.base_layer.quant_state = m.base_layer.weight.quant_state

    both(nf4, after=change)


@pytest.mark.parametrize("which", ["base_layer.weight", "base_layer.bias", "all"])
def test_base_unfrozen(which):
    def unfreeze(model):
        for n, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or which == "all" or n.endswith(which))

    model = both(lambda: dense(config={"attention_bias": True}), after=unfreeze)
    assert any("base_layer" in n for n in gradients(model))


def test_unfrozen_without_an_adapter():
    """Full fine-tuning of a model whose adapter was taken off; some siblings learn, others do not."""

    def unfreeze(model):
        model.unload()
        for n, p in model.named_parameters():
            p.requires_grad_("q_proj" in n or "up_proj" in n or "norm" in n)

    model = both(dense, after=unfreeze)
    assert len(gradients(model)) == 4 + 5


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_to_another_dtype(dtype, base):
    both(BASES[base], after=lambda m: m.to(dtype))


@pytest.mark.parametrize("base", BASES)
def test_an_optimizer_step_is_seen_at_once(base):
    def step(model):
        optimizer = torch.optim.SGD(trainable(model), lr=0.2)
        for i in range(2):
            model(tokens(seed=i), labels=tokens(seed=i)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return train_step(model) | {n: p for n, p in model.named_parameters() if p.requires_grad}

    both(BASES[base], step)


def test_the_head_is_read_at_call_time():
    def change(model):
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(-1.5)

    both(dense, after=change)

    def tie(model):
        model.get_output_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone() * 0.3)

    both(dense, after=tie)


def test_requires_grad_switched_between_steps():
    def step(model):
        out = {f"first {k}": v for k, v in train_step(model).items()}
        model.zero_grad(set_to_none=True)
        for n, p in model.named_parameters():
            p.requires_grad_("lora_B" in n)
        out |= {f"second {k}": v for k, v in train_step(model).items()}
        for n, p in model.named_parameters():
            p.requires_grad_("lora_A" in n or "q_proj.base" in n)
        model.zero_grad(set_to_none=True)
        return out | {f"third {k}": v for k, v in train_step(model).items()}

    both(dense, step)


def test_a_dtype_stock_refuses_is_refused():
    """Base weights of another dtype than the input, without autocast: stock raises, so do we."""

    def spoil(model):
        model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.to(torch.bfloat16)
        return model

    for model in (spoil(dense()), spoil(fastft.patch(dense()))):
        with pytest.raises(RuntimeError, match="dtype"):
            train_step(model)


@pytest.mark.parametrize("base", BASES)
def test_deepcopy_shares_nothing(base):
    ours = fastft.patch(BASES[base]())
    before = run(ours, train_step)
    ours.zero_grad(set_to_none=True)
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for p in trainable(other):
            p.add_(0.02)
    same_bits(before, run(ours, train_step))
    ours.zero_grad(set_to_none=True)
    changed = run(other, train_step)
    assert not fallbacks(other) and (changed["logits"] - before["logits"]).abs().max() > 0.1
    stock = BASES[base]()
    with torch.no_grad():
        for p in trainable(stock):
            p.add_(0.02)
    judge(changed, run(in_float64(stock), train_step, reference=True), run(stock, train_step))
