"""Device, versions, the measured roof and the model's shape: what a table of speeds is read with."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from typing import Any

import torch

from fastft.tools.bench.limits import ModelShape
from fastft.tools.bench.spec import Spec
from fastft.tools.bench.stacks import autocast, device
from fastft.tools.bench.timing import measure_roof

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "liger_kernel", "unsloth", "fastft")


def about(spec: Spec, model: Any) -> dict[str, Any]:
    """{"device", "versions"}; of stock's process also {"roof"}, which all stacks share; of the reference's, which may
    run on another device, {"reference", "shape"}, the last None for what has no known limit."""
    where = device()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(where)
        if where.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    }
    found["versions"] = {p: _version(p) for p in PACKAGES}
    if spec.stack == "stock":
        stored = model.config.dtype if model.config.dtype in (torch.bfloat16, torch.float16) else torch.float32
        found["roof"] = asdict(measure_roof(where, autocast() or stored))
    if spec.stack != "reference":
        return found
    found["reference"] = next(str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad)
    try:
        found["shape"] = asdict(_shape(spec))
    except ValueError as e:
        found["shape"], found["no limit"] = None, str(e)
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _shape(spec: Spec) -> ModelShape:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return ModelShape.of(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec.model)))
