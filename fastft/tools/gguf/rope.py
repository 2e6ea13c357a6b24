"""Rotary embeddings as GGUF holds them: a base, a scaling's own numbers, or one factor a frequency.

    angle_i = position * base^(-2i/d) / factor_i

Whatever scaling transformers applies once and for all (linear, llama3, yarn) is such factors, taken from its own
frequencies; that is how families whose llama.cpp code reads factors get them."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastft.errors import ExportError
from fastft.tools.gguf.families import GGUFFamily, head_dim


def rope_base(parameters: dict[str, Any]) -> float:
    """Of the frequencies."""
    return float(parameters["rope_theta"])


def add_rope(writer: Any, family: GGUFFamily, config: Any) -> dict[str, torch.Tensor]:
    """Write the metadata; returns the tensors of factors, by their names in the file.

    Raises:
        ExportError: a scaling that llama.cpp's code for the family does not have."""
    import gguf

    whole: dict[str, Any] = dict(config.rope_parameters)
    full = whole.get("full_attention", whole)
    kind = full.get("rope_type", "default")
    if kind not in family.rope:
        raise ExportError(
            f"export: rotary scaling {kind!r} is not in llama.cpp's code for {family.arch.lower()} models (it has "
            f"{', '.join(family.rope)}): use --to merged"
        )
    dims = int(
        head_dim(config) * full.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1)
    )
    writer.add_rope_dimension_count(dims)
    writer.add_rope_freq_base(rope_base(full))
    if "sliding_attention" in whole:
        local = whole["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise ExportError("export: llama.cpp scales no rotary embedding of layers with a window: use --to merged")
        writer.add_rope_freq_base_swa(rope_base(local))
    if kind == "default":
        return {}
    if kind == "longrope":
        return _long(writer, config, full, dims)
    if family.arch == "LLAMA":
        return _factors(writer, config, full, dims)
    writer.add_rope_scaling_factor(float(full["factor"]))
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            int(full.get("original_max_position_embeddings") or config.max_position_embeddings)
        )
        writer.add_rope_scaling_yarn_beta_fast(float(full.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(full.get("beta_slow") or 1))
        _, scale = _frequencies(config, "yarn")
        usual = 1 + 0.1 * math.log(full["factor"])
        if abs(scale - usual) > 1e-6:
            writer.add_rope_scaling_attn_factors(scale / usual)
    return {}


def _frequencies(config: Any, kind: str) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


def _factors(writer: Any, config: Any, full: dict[str, Any], dims: int) -> dict[str, torch.Tensor]:
    found, scale = _frequencies(config, full["rope_type"])
    plain = rope_base(full) ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    if scale != 1.0:
        writer.add_rope_scaling_attn_factors(float(scale))
    return {"rope_freqs.weight": (plain / found.double()).float()}


def _long(writer: Any, config: Any, full: dict[str, Any], dims: int) -> dict[str, torch.Tensor]:
    import gguf

    until = full.get("original_max_position_embeddings") or config.original_max_position_embeddings
    short, long = (torch.tensor(full[k], dtype=torch.float32) for k in ("short_factor", "long_factor"))
    if len(short) != dims // 2 or len(long) != dims // 2:
        raise ExportError(f"export: want {dims // 2} factors of the rotary embedding, got {len(short)} and {len(long)}")
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(int(until))
    _, scale = _frequencies(config, "longrope")
    writer.add_rope_scaling_attn_factors(float(scale))
    return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
