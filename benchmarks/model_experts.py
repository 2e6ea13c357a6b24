"""The experts of one architecture, for the sweep of `benchmarks.models`: LoRA on every stack of matrices, by PEFT's
`target_parameters`, in float32 and in bfloat16, and full fine-tuning in bfloat16 (float32 is the sweep's own).

Each is `one_way`: loss and every gradient by the judge, pooled over neighbours of the model, and the exact undo. In
bfloat16 a token whose scores are nearly equal goes to one expert or the other by the rounding of what came before, and
every gradient jumps: there the three runs take the float64 run's choices (`Choices`)."""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Callable

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

WAYS = ("experts", "experts bfloat16", "full bfloat16")
RANK = 16


class Choices:
    """What `torch.topk` chose in the float64 run of each neighbour, to be chosen again by the others, with their own
    scores at these places: in `run(neighbour, note=True)` noted, in `run(neighbour)` taken."""

    def __init__(self):
        self.of: dict[int, list[torch.Tensor]] = {}

    def run(self, draw: int, note: bool = False) -> contextlib.AbstractContextManager:
        if note:
            self.of[draw] = []
        return _Topk(self.of[draw], note)


class _Topk(TorchFunctionMode):
    def __init__(self, chosen: list[torch.Tensor], note: bool):
        super().__init__()
        self.chosen, self.note, self.at = chosen, note, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return out
        if self.note:
            self.chosen.append(out.indices)
            return out
        index, self.at = self.chosen[self.at], self.at + 1
        if index.shape != out.indices.shape:
            raise RuntimeError(f"topk of {tuple(out.indices.shape)} where float64 chose {tuple(index.shape)}")
        dim = args[2] if len(args) > 2 else (kwargs or {}).get("dim", -1)
        return torch.return_types.topk((args[0].gather(dim, index), index))


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
            rows[way] = one_way(stock, batch, loss_of, None if way == "experts" else Choices())
        except Exception:
            rows[way] = {"exception": traceback.format_exc()[-1500:]}
    return rows
