"""Tiny mixtures of experts of several layouts, stock and patched, trained in full and with adapters on the experts."""

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import fastft
from benchmarks import tiny
from fastft.experts.layer import is_wrapper
from fastft.experts.structure import experts_of
from fastft.patching.kind import Context
from fastft.patching.observe import Observation

# concatenated and interleaved gates, biases, stored either way round, no gate, shared experts, a router of its own
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe_swa", "nemotron_h", "phimoe", "olmoe"]


def build(family: str, dtype: torch.dtype = torch.float32):
    """Eager experts: torch's grouped products, stock's default, know no float64."""
    model = tiny.build(family).to(dtype).train()
    model.set_experts_implementation("eager")
    return model


def stacks(model) -> list[str]:
    """Names of the experts' matrices."""
    modules = [(n, m) for n, m in model.named_modules() if experts_of(m)]
    return [f"{n}.{p}" for n, m in modules for p, t in m._parameters.items() if t is not None and t.dim() == 3]


def with_adapters(model, r: int = 4, **settings):
    """LoRA on all experts, both factors drawn: the first step trains both."""
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=[], target_parameters=stacks(model), **settings)
    return drawn(get_peft_model(model, config))


def drawn(model, seed: int = 3):
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * (0.2 if "lora_B" in name else 0.1))
    return model


def patched(model):
    return fastft.patch(copy.deepcopy(model))


def rows(model):
    """(swapped, stock) rows of the report that are about experts."""
    found = [r for r in fastft.report(model).rows if r.kind == "experts"]
    return [r for r in found if r.is_swapped], [r for r in found if not r.is_swapped]


def experts_in(model) -> Any:
    """The first module of experts, or the outermost wrapper around them."""
    return next(m for m in model.modules() if experts_of(m) or is_wrapper(m))


def recognise(module, kind):
    seen = Observation()
    return kind.recognise(module, Context(module, seen, {module: "experts"}))


def fallbacks(model) -> dict[str, int]:
    return {k: n for k, n in fastft.report(model).fallbacks.items() if k.startswith("experts")}
