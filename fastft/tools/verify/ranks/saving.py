"""The saved adapter, or model, and what of it differs from what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastft.tools.verify.ranks.strategies import gathered
from fastft.tools.verify.ranks.training import Results, trained


def as_saved(model: Any, weights: Results) -> Results:
    """The weights that train by the names that their file has for them; {} for a model without an adapter, whose file
    is read by loading it."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)


def difference(wanted: Results, found: Results, where: str) -> str:
    """The first tensor of `found` that is not what was wanted, and what is wrong with it; empty where all are equal."""
    for name, want in wanted.items():
        got = found.get(name)
        if got is None:
            return f"{where} lacks {name}"
        if got.shape != want.shape:
            return f"{where} has {_part(want, got)} of {name}: {list(got.shape)} instead of {list(want.shape)}"
        if not torch.equal(got.to(want.device, want.dtype), want):
            off = float((got.to(want.device).double() - want.double()).abs().max())
            return f"{where} has other values of {name}, up to {off:.1e} apart"
    odd = sorted(set(found) - set(wanted))
    return f"{where} has {odd[0]}, which does not train" if odd else ""


def _part(want: torch.Tensor, got: torch.Tensor) -> str:
    if not got.numel():
        return "nothing"
    smaller = got.dim() == want.dim() and all(a <= b for a, b in zip(got.shape, want.shape))
    return "a slice" if smaller else "another shape"


def file_of(folder: Path) -> Results:
    """The tensors of an adapter's file; {} where there is none."""
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    return load_file(path) if path.exists() else {}


def loaded(model: Any) -> Results:
    """The parameters that train of a model as it was loaded."""
    return {n: gathered(p) for n, p in trained(model).items()}
