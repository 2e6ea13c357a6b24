"""Tiny Llamas and Qwen3s, and the batch that two processes share."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fastft.tools.verify.ranks.batches import part, tokens_of
from tests.linear.lora_models import SMALL, Results, adapted, quantised

VOCAB = 96
CASES = [f"{m}-{w}" for m in ("llama", "qwen3") for w in ("lora", "nf4", "full")]
SIZES = SMALL | dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16)
FAMILIES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
EXPERTS = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a case, the same on every process."""
    family, weights = name.split("-")
    torch.manual_seed(0)
    config, cls = FAMILIES[family]
    model = cls(config(**SIZES | (EXPERTS if family == "moe" else {})))
    if family == "moe":
        model.config._experts_implementation = "eager"  # as float64 has no other
    for p in model.parameters():
        if p.dim() >= 2:
            nn.init.normal_(p, std=0.15)
    model = model.to(dtype).train()
    if weights == "full":
        return model
    if weights == "nf4":
        model = quantised(model, compute=dtype, storage=dtype)  # a floating storage: FSDP2 shards no other
    return adapted(model)


def whole(draw: int = 0) -> dict[str, torch.Tensor]:
    """Four rows, padded on the right to different lengths, so that the two halves have different numbers of tokens."""
    g = torch.Generator().manual_seed(7 + draw)
    ids = torch.randint(3, VOCAB, (4, 16), generator=g)
    mask = torch.ones_like(ids)
    for row, n in enumerate((16, 9, 12, 5)):
        mask[row, n:] = 0
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def half(rank: int, draw: int = 0) -> dict[str, torch.Tensor]:
    """This process's rows."""
    return part(whole(draw), rank, 2)


def step_of(model: nn.Module, draws: int) -> Results:
    """Loss and every gradient of one process, of each batch."""
    results = {}
    for i in range(draws):
        model.zero_grad(set_to_none=True)
        loss = model(**whole(i), num_items_in_batch=tokens_of(whole(i))).loss
        loss.backward()
        results[name_of("loss", i)] = loss.detach()
        for n, p in model.named_parameters():
            if p.grad is not None:
                results[name_of(f"d {n}", i)] = p.grad.clone()
    return results


def name_of(what: str, draw: int) -> str:
    """As `judge` pools what several batches give."""
    return f"{what} ({draw})" if draw else what
