"""Kernels with hand-derived backward passes, on torch and, where it exists, Triton. Knows nothing of transformers.

    runtime/    how kernels are launched, and compiled ahead of time
    norm/  rotary/  mlp/  experts/  lora/  lm_head/    the operations, by the part of a model that uses them
    quant/      formats of frozen weights
    recompute/  what a backward computes again in place of keeping it
    numerics    `compare`, the judge of errors

The functions below can be imported from here; nothing is imported before the first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft_kernels.experts.grouped_experts import grouped_experts
    from fastft_kernels.lm_head.linear_cross_entropy import linear_cross_entropy
    from fastft_kernels.lm_head.linear_logprob import linear_logprob
    from fastft_kernels.lm_head.linear_logsumexp import linear_logsumexp
    from fastft_kernels.lora.lora_linear import lora_linear
    from fastft_kernels.mlp.activation import activation
    from fastft_kernels.mlp.glu import glu
    from fastft_kernels.norm.gated_rms_norm import gated_rms_norm
    from fastft_kernels.norm.layer_norm import layer_norm
    from fastft_kernels.norm.rms_norm import rms_norm
    from fastft_kernels.numerics import compare
    from fastft_kernels.rotary.rope import rope

_WHERE = {
    "activation": "mlp.activation",
    "compare": "numerics",
    "gated_rms_norm": "norm.gated_rms_norm",
    "glu": "mlp.glu",
    "grouped_experts": "experts.grouped_experts",
    "layer_norm": "norm.layer_norm",
    "linear_cross_entropy": "lm_head.linear_cross_entropy",
    "linear_logprob": "lm_head.linear_logprob",
    "linear_logsumexp": "lm_head.linear_logsumexp",
    "lora_linear": "lora.lora_linear",
    "rms_norm": "norm.rms_norm",
    "rope": "rotary.rope",
}
__all__ = [
    "activation",
    "compare",
    "gated_rms_norm",
    "glu",
    "grouped_experts",
    "layer_norm",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_logsumexp",
    "lora_linear",
    "rms_norm",
    "rope",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
