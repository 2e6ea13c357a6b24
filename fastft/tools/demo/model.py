"""A model small enough for any machine: a byte-level BPE tokenizer and a decoder, trained on docstrings for a minute
and saved.

The model learns the English of the docstrings as running text. It never sees a signature or the demo's prompt, so the
fine-tuning that follows has something to teach."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastft.tools.demo.corpus import Pair


@dataclass(frozen=True)
class DecoderSize:
    """The decoder and its pre-training. The defaults take about a minute on two cores."""

    vocab: int = 2048
    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    steps: int = 240
    batch: int = 16
    tokens: int = 64
    learning_rate: float = 3e-3


def train_tokenizer(texts: list[str], vocab: int):
    """A byte-level BPE in transformers' fast-tokenizer format, with end-of-text as eos and a separate pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[0], pad_token=special[1])


def build(size: DecoderSize, tokenizer) -> Any:
    """A decoder of `size` with random weights, for the demo's tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pretrain(
    pairs: list[Pair], folder: Path, size: DecoderSize, seed: int, on_step: Callable[[int, float], None]
) -> float:
    """Train tokenizer and decoder on the docstrings of `pairs`, save both to `folder`; returns the last loss."""
    tokenizer = train_tokenizer([p.doc for p in pairs] + [p.prompt for p in pairs], size.vocab)
    ids = [i for p in pairs for i in (*tokenizer(p.doc).input_ids, tokenizer.eos_token_id)]
    usable = len(ids) // size.tokens * size.tokens
    rows = torch.tensor(ids[:usable]).view(-1, size.tokens)  # [rows, tokens]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    model = build(size, tokenizer).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, weight_decay=0.01)
    ramp = lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / size.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, ramp)
    loss = math.nan
    for step in range(size.steps):
        batch = rows[torch.randint(len(rows), (size.batch,))].to(device)
        out = model(input_ids=batch, labels=batch)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        loss = out.loss.item()
        on_step(step, loss)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss
