"""GPT-2's Conv1D is a linear layer whose weight is stored [in, out]: a member of groups like any other, with and
without an adapter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import fastft
from fastft.linear.projection import Inexpressible, base_weight
from tests.linear.lora_models import VOCAB, adapted, both, drawn, groups_of, run, same_bits, tokens, train_step

TARGETS = ["c_attn", "c_proj", "c_fc"]


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **off,
    )
    model = GPT2LMHeadModel(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)
    return model.to(dtype).train()


def with_lora(dtype=torch.float32, **settings):
    return adapted(gpt2(dtype), target_modules=TARGETS, fan_in_fan_out=True, **settings)


def unfreeze(model):
    for p in model.parameters():
        p.requires_grad_(True)


SETTINGS = {
    "plain": dict(),
    "dropout": dict(dropout=0.2),
    "trainable bias": dict(bias="lora_only"),
    "its own bias": dict(lora_bias=True),
    "one layer": dict(layers_to_transform=[1]),
    "pissa": dict(init_lora_weights="pissa"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_adapters(name):
    model = both(lambda: with_lora(**SETTINGS[name]))
    bases = {type(m.base_layer) for m in model.modules() if hasattr(m, "base_layer")}
    assert bases == {Conv1D} and not fastft.report(model).stock and len(groups_of(model)) == 8


def test_the_base_learns():
    """In full, and beside its adapter: the gradient has the weight's own layout."""
    for make in (gpt2, with_lora):
        model = both(make, after=unfreeze)
        weights = [m.weight for m in model.modules() if isinstance(m, Conv1D)]
        assert len(weights) == 8 and all(w.grad.shape == w.shape and w.grad.is_contiguous() for w in weights)


@pytest.mark.parametrize("cast", [False, True], ids=["pure", "autocast"])
def test_bfloat16(cast):
    def step(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = model(tokens(), labels=tokens())
        out.loss.backward()
        return {
            "loss": out.loss.detach(),
            **{f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None},
        }

    both(lambda: with_lora(torch.float32 if cast else torch.bfloat16, fp32=False), step)


def test_merged_and_back():
    def step(model):
        model.merge_adapter()
        merged = model(tokens()).logits.detach()
        model.unmerge_adapter()
        return {"merged": merged, **train_step(model)}

    both(with_lora, step, fast=False)
    stock, ours = with_lora().merge_and_unload(), fastft.patch(with_lora()).merge_and_unload()
    same_bits(stock.state_dict(), ours.state_dict())


def test_put_on_after_the_patch_and_taken_off():
    def later(model):
        return drawn(
            get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, fan_in_fan_out=True, task_type="CAUSAL_LM"))
        ).train()

    ours, stock = later(fastft.patch(gpt2())), later(gpt2())
    run(ours, train_step)
    rows = [r for r in fastft.report(ours) if r.kind == "linear group"]
    assert sum(r.count for r in rows if r.is_swapped) == 8 and not [r for r in rows if not r.is_swapped]
    ours.zero_grad(set_to_none=True)
    fastft.unpatch(ours)
    same_bits(run(ours, train_step), run(stock, train_step))


def test_a_weight_that_is_not_all_here():
    layer = Conv1D(6, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(Inexpressible, match="sharded"):
        base_weight(layer)
