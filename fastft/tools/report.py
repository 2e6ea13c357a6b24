"""`fastft report`: what would be swapped in a model, from its configuration alone.

The model is built on the meta device, so that it costs no memory; structure is observed there, and every proof runs on
small real tensors on the CPU. Nothing but the configuration is read or downloaded."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from fastft.api import patch, report
from fastft.compat.transformers_private import from_config, knows
from fastft.errors import ModelNotFoundError
from fastft.linear.float8_linear import Float8Linear
from fastft.loading.checkpoint import adapter_config, base_of_adapter, check_name, not_found
from fastft.loading.fp8 import linears_of
from fastft.patching.report import PatchReport


def report_from_config(
    name_or_path: str, *, lora: bool = True, fp8: bool = False, trust_remote_code: bool = False
) -> PatchReport:
    """The report of the model that `name_or_path`'s configuration describes, with LoRA on all its linears (or without);
    fp8: with these in FP8, as `load_in_fp8=True` has them.

    Raises ModelNotFoundError where there is no configuration, or no class for it.
    """
    from transformers import AutoConfig

    check_name(name_or_path, {})
    adapter, notes = adapter_config(name_or_path, {}) if os.path.isdir(name_or_path) else None, ()
    if adapter is not None:
        adapter.inference_mode = False  # as saved; here it trains
        base = base_of_adapter(adapter, name_or_path, {})[0]
        notes = (f"the adapter {name_or_path} on its base {base}",)
        name_or_path = base
        check_name(name_or_path, {})
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except OSError as e:
        raise not_found(name_or_path, e) from e
    except ValueError as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelNotFoundError(f"no configuration at {name_or_path!r}: {first}") from e
    model = on_meta(config, trust_remote_code)
    if fp8:
        in_fp8(model)
    if lora:
        from peft import LoraConfig, get_peft_model

        with torch.device("meta"):
            model = get_peft_model(model, adapter or LoraConfig(target_modules="all-linear"))
    found = report(patch(model))
    return replace(found, notes=notes + found.notes)


def in_fp8(model: torch.nn.Module) -> None:
    """A model without adapters, frozen, its linear layers in FP8 with a scale for each row, as FastModel's loader has
    them."""
    model.requires_grad_(False)
    for linear in linears_of(model):
        Float8Linear.of(linear)


def on_meta(config, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The class that the configuration names, else the first auto class that knows it."""
    import transformers

    dtype = dtype or getattr(config, "dtype", None) or torch.bfloat16
    named = next((c for n in config.architectures or () if (c := getattr(transformers, n, None)) is not None), None)
    with torch.device("meta"):
        if named is not None:
            return from_config(named, config, dtype=dtype)
        for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel"):
            cls = getattr(transformers, auto)
            if knows(cls, config) or (trust_remote_code and auto in getattr(config, "auto_map", {})):
                return cls.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    raise ModelNotFoundError(f"no model class for a {type(config).__name__}")
