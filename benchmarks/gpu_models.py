"""Decoders of known shapes with random weights, made on the device: adapters as PEFT makes them, bases in bf16 or NF4,
batches of tokens."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from benchmarks.sheet import Missing

Batch = dict[str, torch.Tensor]
RANK = 16
HAS_TRL = importlib.util.find_spec("trl") is not None


def config_8b(tiny: bool, layers: int | None = None) -> PretrainedConfig:
    """The shape of Llama-3.1-8B. Weights are drawn N(0, 0.02): zeros or constants would draw less power and run
    faster."""
    if tiny:
        sizes = dict(
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=160,
        )
        return LlamaConfig(**sizes, num_hidden_layers=layers or 2, max_position_embeddings=512)
    sizes = dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
    )
    return LlamaConfig(**sizes, num_hidden_layers=layers or 32, max_position_embeddings=131072)


def config_small(tiny: bool, layers: int | None = None) -> PretrainedConfig:
    """The shape of Qwen3-0.6B."""
    if tiny:
        sizes = dict(
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=160,
        )
        return Qwen3Config(
            **sizes, num_hidden_layers=layers or 2, tie_word_embeddings=True, max_position_embeddings=512
        )
    sizes = dict(
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    return Qwen3Config(**sizes, num_hidden_layers=layers or 28, tie_word_embeddings=True, max_position_embeddings=40960)


def build(config: PretrainedConfig, device: torch.device, *, four_bit: bool = False, seed: int = 0) -> nn.Module:
    """A PEFT model in training mode: bf16 or NF4 base, float32 adapters (PEFT's default) on all linears, B drawn so
    that every gradient is there; with TRL's fused head where TRL is installed. Raises Missing without bitsandbytes."""
    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise Missing("NF4 needs bitsandbytes, which is not installed")
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if four_bit:
        _quantise(model)
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * 0.02
            )
    model.config.use_cache = False
    model.enable_input_require_grads()
    return with_trl_head(model).train()


def with_trl_head(model: nn.Module) -> nn.Module:
    """The same instance, whose base model's forward is TRL's; as it was without TRL. A copy of a model is given its own
    this way."""
    if HAS_TRL:
        from trl.trainer.utils import add_fused_lm_head

        model.get_base_model().__dict__.pop("forward", None)
        add_fused_lm_head(model.get_base_model())
    return model


def _quantise(model: nn.Module) -> None:
    """Every linear but the head in NF4 with double quantisation, one at a time, as transformers' loader leaves it."""
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear and child is not head:
                new = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    device="meta",
                )
                new.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
                )
                new.bias = child.bias
                parent._modules[name] = new.to(child.weight.device)
    model.is_loaded_in_4bit = True  # what PEFT asks


def batch(lengths: Sequence[int], vocab: int, device: torch.device, seed: int = 0) -> Batch:
    """Rows of these lengths, padded on the right as TRL's collator pads; labels of padding are -100. A batch without
    padding has no mask."""
    width = max(lengths)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (len(lengths), width), generator=g)
    mask = torch.arange(width)[None] < torch.tensor(list(lengths))[:, None]
    found = {"input_ids": ids.masked_fill(~mask, 0), "labels": ids.masked_fill(~mask, -100)}
    if not mask.all():
        found["attention_mask"] = mask.long()
    return {k: v.to(device) for k, v in found.items()}


def alpaca_lengths(rows: int, tiny: bool, seed: int = 0) -> list[int]:
    """Log-normal with median 120 and 95th percentile about 320 tokens, as Alpaca's: most of a padded batch is
    padding."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.exp(torch.randn(rows, generator=g) * 0.6 + (2.5 if tiny else 4.787))
    return [int(n) for n in drawn.clamp(4 if tiny else 24, 40 if tiny else 1024)]


def checkpoint_layers(model: nn.Module, on: bool) -> None:
    """Every layer checkpointed, without re-entrance, as TRL asks for it; or none. (transformers renamed it in
    between.)"""
    base = model.get_base_model()
    if on:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    else:
        (getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable)()
