"""Base + adapter as plain transformers and PEFT run them, in float32: what every result is compared with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from fastft.tools.merge.base import as_trained, read_json, weights
from fastft.tools.merge.merge_plan import MergePlan


def load_base(base: Path, plan: MergePlan) -> Any:
    """The base in float32: its 4-bit weights expanded, or taken through 4 bits or FP8 where the plan says so, and its
    embeddings of the adapter's size."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if "quantization_config" in read_json(base / "config.json"):
        model = model.dequantize().float()
    if plan.rounded is not None:
        names, kind, double = plan.rounded
        for path in plan.files:
            for name, t in weights(path):
                if name in names:
                    model.get_parameter(name).data.copy_(as_trained(t, kind, double))
    if plan.vocab is not None:
        model.resize_token_embeddings(plan.vocab, mean_resizing=False)
    return model


def load_reference(base: Path, adapter: Path | None, plan: MergePlan) -> Any:
    """Base + adapter in float32, the adapter not merged; the base alone where there is no adapter."""
    model = load_base(base, plan)
    if adapter is None:
        return model
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of tied weights, which the merge has thought of
        return PeftModel.from_pretrained(model, str(adapter)).eval()
