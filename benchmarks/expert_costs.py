"""One layer of experts with LoRA on all of them, at the sizes that people train, on fake tensors: bytes kept for the
backward and arithmetic, of transformers' grouped implementation under PEFT's adapters and of ours.

Every grouped product has its formula here: torch's counter knows none, and an operator that it does not know counts
nothing, so that a layer of experts would look free. Rows of all experts together count, as their matrices are alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GptOssConfig, PretrainedConfig, Qwen3MoeConfig

import fastft_kernels.experts.grouped_mm  # noqa: F401  registers the operators
from benchmarks.fake import FORMULAS, Cost, Patch, build, counting
from fastft.experts.layer import is_wrapper
from fastft.proving.prove import formula_alone
from fastft.tools.plan.fake import to_fake

RANK = 16


def _rows_by_matrices(x, w, *args, out_shape=None, **kwargs) -> int:
    """[S, K] by [E, K, N]; and the gradient of the matrices, [K, S] by [S, N]."""
    return 2 * x[0] * x[1] * w[-1]


def _rows_by_rows(x, y, *args, out_shape=None, **kwargs) -> int:
    """[S, K] by [S, N]"""
    return 2 * x[0] * x[1] * y[1]


def _thin_by_rows(thin, scale, wide, *args, out_shape=None, **kwargs) -> int:
    return _rows_by_rows(thin, wide)


def _sums(y, *args, out_shape=None, **kwargs) -> int:
    return y[0] * y[1]


FORMULAS |= {
    torch.ops.aten._grouped_mm: _rows_by_matrices,
    torch.ops.fastft.grouped_mm: _rows_by_matrices,
    torch.ops.fastft.grouped_mm_t: _rows_by_rows,
    torch.ops.fastft.grouped_outer: _thin_by_rows,
    torch.ops.fastft.grouped_sum: _sums,
}


@dataclass(frozen=True)
class Size:
    """config: of a model with one layer. experts, hidden, inner, top_k: of that layer."""

    config: PretrainedConfig
    experts: int
    hidden: int
    inner: int
    top_k: int

    def frozen(self, tokens: int) -> float:
        """FLOPs of the products with the weights, forward and for the input's gradient."""
        return 2 * 2 * tokens * self.top_k * 3 * self.hidden * self.inner

    def factored(self, tokens: int) -> float:
        """FLOPs of a step that never makes W + BA: those, and thin products for both and for the adapters'
        gradients."""
        return self.frozen(tokens) + 2 * 3 * tokens * self.top_k * RANK * (2 * self.hidden + 3 * self.inner)


def sizes() -> dict[str, Size]:
    few = {"num_hidden_layers": 1, "vocab_size": 256}
    return {
        "128 experts, top 8 (Qwen3-30B-A3B)": Size(
            Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, **few),
            *(128, 2048, 768, 8),
        ),
        "32 experts, top 4 (gpt-oss-20b)": Size(
            GptOssConfig(hidden_size=2880, intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4, **few),
            *(32, 2880, 2880, 4),
        ),
    }


def experts_cost(size: Size, tokens: int, patch: Patch | None = None) -> Cost:
    """Forward and backward of the layer's experts, adapters in bfloat16 as their experts. Raises RuntimeError where
    less was counted than the products with the weights take: an operator without a formula."""
    lora = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=_stacks(size.config), task_type="CAUSAL_LM"
    )
    model = build(size.config, lora, fp32_adapters=False, attention=None)
    if patch is not None:
        with formula_alone():
            model = patch(model)
    experts: Callable = next(m for m in model.modules() if is_wrapper(m))
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_fake(model)
        x = torch.empty(tokens, size.hidden, dtype=torch.bfloat16, requires_grad=True)
        weights = torch.empty(tokens, size.top_k, dtype=torch.bfloat16, requires_grad=True)
        index = torch.empty(tokens, size.top_k, dtype=torch.long)
        with counting([*model.parameters(), x, weights, index]) as cost:
            experts(x, index, weights).sum().backward()
    if sum(n for name, n in cost.operators.items() if "grouped" in name) < size.frozen(tokens):
        raise RuntimeError(f"experts: a grouped product has no formula; counted were {cost.operators}")
    return cost


def _stacks(config: PretrainedConfig) -> list[str]:
    """Names of the matrices of all experts, for `target_parameters`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return [n for n, p in model.named_parameters() if p.dim() == 3]
