"""An adapter's changes to stacks of experts' matrices (PEFT's `target_parameters`).

    X.lora_A [E r, a], X.lora_B [b, r E]     W[e] + s B[e] A[e], or W[e] + s (B[e] A[e])^T, as PEFT took the stack

PEFT saves the pairs of a module by the order in which it wrapped its parameters: which pair belongs to which parameter,
and which way round, is asked of PEFT itself, on a model without memory. A base stores the stack whole, or each expert's
matrices by themselves (gate_proj, up_proj and down_proj), gate before up."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fastft.compat.peft_private import swaps_in_and_out

if TYPE_CHECKING:
    from peft import LoraConfig

Parts = dict[str, dict[str, torch.Tensor]]
_SINGLE = re.compile(r"(.+)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True)
class ExpertsDelta:
    """A: [E, r, a], B: [E, b, r]. straight: an expert's matrix is stored [b, a], else [a, b]."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    straight: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the stack."""
        a, b = self.A.shape[2], self.B.shape[1]
        return (len(self.A), b, a) if self.straight else (len(self.A), a, b)

    def of(self, expert: int) -> torch.Tensor:
        """One expert's, in float32, as its matrix is stored in the stack."""
        delta = self.scaling * (self.B[expert].float() @ self.A[expert].float())
        return delta if self.straight else delta.t()


def is_stacked(module: str, config: LoraConfig) -> bool:
    """Are this module's pairs, by their name in the adapter's file, on a parameter of `target_parameters`?"""
    real = module.replace(".base_layer", "")
    owners = {t.rpartition(".")[0] for t in config.target_parameters or ()}
    return any(real == o or real.endswith(f".{o}") for o in owners if o)


def resolve(pairs: Parts, config: LoraConfig, base: Path) -> tuple[dict[str, ExpertsDelta], list[str]]:
    """({name of a stack: its change}, names of modules whose pairs no stack of three dimensions takes)."""
    from peft import get_peft_model
    from peft.tuners.lora.layer import ParamWrapper
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        model = get_peft_model(model, cast(Any, copy.deepcopy(config)), low_cpu_mem_usage=True)
    found, left = {}, dict(pairs)
    for name, wrapper in model.named_modules():
        key = name.removeprefix("base_model.model.")
        if not isinstance(wrapper, ParamWrapper) or key not in left or wrapper.get_param().dim() != 3:
            continue
        A, B = (left[key].get(f".lora_{side}.weight") for side in "AB")
        experts = wrapper.num_experts
        if A is None or B is None or len(left[key]) != 2 or len(A) % experts or B.shape[1] != len(A):
            continue
        del left[key]
        (scaling,) = wrapper.scaling.values()
        real = key.replace(".base_layer", "")
        found[f"{real}.{wrapper.parameter_name}"] = ExpertsDelta(
            A.view(experts, -1, A.shape[1]),
            B.view(B.shape[0], -1, experts).permute(2, 0, 1),
            float(scaling),
            swaps_in_and_out(wrapper),
        )
    return found, list(left)


def add(stacks: dict[str, ExpertsDelta], name: str, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The base's tensor `name` with its change in `dtype`, one expert at a time; None where there is none."""
    if name in stacks:
        result = torch.empty(t.shape, dtype=dtype)
        for e in range(len(t)):
            result[e] = t[e].float() + stacks[name].of(e)
        return result
    if (single := _single(stacks, name)) is None:
        return None
    delta, expert, half = single
    change = delta.of(expert)
    return (t.float() + (change if half is None else change.chunk(2)[half])).to(dtype)


def _single(stacks: dict[str, ExpertsDelta], name: str) -> tuple[ExpertsDelta, int, int | None] | None:
    """(change, expert, which half) of one expert's own matrix."""
    if (m := _SINGLE.fullmatch(name)) is None:
        return None
    owner, expert, part = m.group(1), int(m.group(2)), m.group(3)
    fused = stacks.get(f"{owner}.gate_up_proj") if part != "down_proj" else None
    delta = fused or stacks.get(f"{owner}.{part}")
    if delta is None or expert >= len(delta.A):
        return None
    return delta, expert, None if fused is None else 0 if part == "gate_proj" else 1


def misfits(stacks: dict[str, ExpertsDelta], shapes: dict[str, tuple[int, ...] | None]) -> Iterator[str]:
    """Which stacks the base, whose tensors have these shapes, cannot take, and why."""
    for name, delta in stacks.items():
        if name in shapes:
            if shapes[name] != delta.shape:
                yield f"{name} is {shapes[name]}, the adapter's {delta.shape}: it is another base"
            continue
        owner, _, own = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if own == "gate_up_proj" else (own,)
        rows, cols = delta.shape[1] // len(parts), delta.shape[2]
        singles = [f"{owner}.{e}.{p}.weight" for e in range(len(delta.A)) for p in parts]
        if not delta.straight or any(shapes.get(n) != (rows, cols) for n in singles):
            yield f"no tensors for the experts' {name}: it is another base, or it stores them under other names"
