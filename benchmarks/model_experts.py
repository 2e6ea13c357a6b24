"""The experts of one architecture, for the sweep of `benchmarks.models`: LoRA on every stack of matrices, by PEFT's
`target_parameters`, in float32 and in bfloat16, and full fine-tuning in bfloat16 (float32 is the sweep's own).

Each is `one_way`: loss and every gradient by the judge, pooled over neighbours of the model, and the exact undo."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable

import torch
from torch import nn

WAYS = ("experts", "experts bfloat16", "full bfloat16")
RANK = 16


def stacks(model: nn.Module) -> list[str]:
    """Names of the experts' matrices, as `target_parameters` has them."""
    from fastft.experts.structure import experts_of

    modules = [(n, m) for n, m in model.named_modules() if experts_of(m)]
    return [f"{n}.{p}" for n, m in modules for p, t in m._parameters.items() if t is not None and t.dim() == 3]


def with_adapters(model: nn.Module, r: int = RANK) -> nn.Module:
    """LoRA on all experts and nothing else, both factors drawn."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=[], target_parameters=stacks(model), init_lora_weights=False
    )
    return get_peft_model(model, config)


def in_bfloat16(model: nn.Module, inputs: dict) -> tuple[nn.Module, dict]:
    """A copy of the model, and of its batch."""
    cast = lambda v: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
    return copy.deepcopy(model).to(torch.bfloat16), {k: cast(v) for k, v in inputs.items()}


def check_experts(model: nn.Module, inputs: dict, loss_of, run: Callable, one_way: Callable) -> dict:
    """{way: the result of `one_way`} for WAYS; empty for a model without experts in 3-D parameters. A model that stock
    cannot run so has {"stock": why}. run, one_way: of `benchmarks.models`."""
    if not stacks(model):
        return {}
    rows: dict = {}
    for way in WAYS:
        try:
            stock, batch = (copy.deepcopy(model), inputs) if way == "experts" else in_bfloat16(model, inputs)
            try:
                if way != "full bfloat16":
                    stock = with_adapters(stock)
                run(stock, batch, loss_of)
            except Exception as e:
                rows[way] = {"stock": f"{type(e).__name__}: {str(e)[:150]}"}
                continue
            rows[way] = one_way(stock, batch, loss_of)
        except Exception:
            rows[way] = {"exception": traceback.format_exc()[-1500:]}
    return rows
