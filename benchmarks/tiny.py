"""Tiny random models from transformers' own configuration classes: every size by the name of its field, nothing else
touched."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

MODEL_TYPES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "olmo2",
    "phi3",
    "cohere",
    "gpt_oss",
    "smollm3",
    "glm4",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "phi",
    "gpt_neox",
    "gpt2",
    "opt",
    "starcoder2",
    "nemotron",
    "stablelm",
    "falcon",
]
SIZES = {
    "hidden_size": 64,
    "n_embd": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(key: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """In training mode, without dropout; norms and biases random, so that a kernel that ignores one is caught."""
    cls = CONFIG_MAPPING[key]
    reference = cls()
    settings = {k: v for k, v in SIZES.items() if getattr(reference, k, None) is not None or k.endswith("token_id")}
    settings |= {k: 0.0 for k in vars(reference) if "drop" in k and isinstance(getattr(reference, k), float)}
    if "qk_rope_head_dim" in settings:
        settings |= {"num_key_value_heads": 4, "head_dim": 8}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(cls(**settings), dtype=torch.float32, attn_implementation="eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no float64, so no reference
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * (0.3 if p.dim() == 1 else 0.1))
    return model.to(dtype).train()


def batch(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(10, 250, (2, 16), generator=torch.Generator().manual_seed(seed + 2))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(16) < 3, -100)}


def loss_of(output) -> torch.Tensor:
    return output.loss
