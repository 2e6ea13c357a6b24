"""Tiny models whose attention differs: full, within a window, soft-capped, with sinks. Windows are shorter than the
documents."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tests.linear.lora_models import adapted, gradients

VOCAB = 64
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    use_cache=False,
    tie_word_embeddings=False,
)
FAMILIES = {
    "full": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "mixed": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES, sliding_window=4, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    ),
    "sinks": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, sliding_window=4, num_local_experts=4, num_experts_per_tok=2)
    ),
}


def build(family: str, lora: bool = False):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    g = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if p.dim() > 1 or "sinks" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.2)
    model.config._experts_implementation = "eager"  # the grouped products know no float64
    return adapted(model) if lora else model.train()


def documents(lengths=(5, 9, 1, 12, 9), seed=0):
    """Token ids [1, n] of each document."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (1, n), generator=g) for n in lengths]


def packed_batch(docs):
    positions = torch.cat([torch.arange(d.shape[1]) for d in docs])[None]
    ids = torch.cat(docs, 1)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def padded_batch(docs, left=False):
    length = max(d.shape[1] for d in docs)
    ids, mask = torch.zeros(len(docs), length, dtype=torch.long), torch.zeros(len(docs), length, dtype=torch.long)
    for row, d in enumerate(docs):
        n = d.shape[1]
        where = slice(length - n, length) if left else slice(0, n)
        ids[row, where], mask[row, where] = d[0], 1
    labels = ids.masked_fill(mask == 0, -100)
    if left:  # what a padded position predicts is no part of the loss
        for row, d in enumerate(docs):
            labels[row, length - d.shape[1]] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(batch):
    def run(model):
        loss = model(**batch).loss
        loss.backward()
        return {"loss": loss.detach(), **gradients(model)}

    return run


def alone(docs):
    """Each document in a batch of its own; the losses weighted as one row weights them."""

    def run(model):
        n, total = sum(d.shape[1] - 1 for d in docs), 0.0
        for d in docs:
            if d.shape[1] > 1:
                loss = model(input_ids=d, labels=d, num_items_in_batch=n).loss
                loss.backward()
                total = total + loss.detach()
        return {"loss": total, **gradients(model)}

    return run
