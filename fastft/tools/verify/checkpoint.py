"""`fastft verify` of a checkpoint, in the precision asked for."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fastft.api import unpatch
from fastft.errors import QuantizationError
from fastft.patching.patcher import innermost
from fastft.tools.verify.modules import in_float64
from fastft.tools.verify.precisions import PrecisionComparison, compare_precisions
from fastft.tools.verify.runner import Verification, random_batch, step, verify, whole_fits


def verify_checkpoint(
    name: str,
    *,
    dtype: str = "auto",
    four_bit: bool = False,
    fp8: bool = False,
    lora: bool = True,
    seq: int = 64,
    size: int = 2,
    layers: bool | None = None,
) -> Verification:
    """`verify` of a checkpoint, or of an adapter on its base, as FastModel loads it. B of a new adapter is drawn: at
    its initial zero no gradient would reach A. fp8: the base in FP8, patched against its specification; and the step
    beside bf16 and NF4 (`precisions`). Raises QuantizationError for `fp8` without an adapter or with `four_bit`."""
    from fastft.loading.fast_model import FastModel

    if fp8 and (four_bit or not lora):
        raise QuantizationError(f"verify: fp8 and {'four_bit' if four_bit else 'no adapter'} were both given: choose")
    how: dict[str, Any] = {"dtype": dtype} | ({} if lora else {"peft_config": None})

    def load(**more: Any) -> Any:
        with (
            torch.random.fork_rng(),
            contextlib.redirect_stdout(io.StringIO()),
        ):  # the table of the verdicts says it all
            torch.manual_seed(0)  # the adapter is drawn alike each time
            model = FastModel.from_pretrained(name, **how, **more)
        generator = torch.Generator().manual_seed(0)
        for n, p in model.named_parameters():
            if "lora_B" in n and not p.any():
                p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        return model

    if not fp8:
        return verify(load(load_in_4bit=four_bit), seq=seq, size=size, layers=layers)
    found = verify(load(load_in_fp8=True), seq=seq, size=size, layers=layers)
    return replace(found, precisions=_precisions(load, seq, size))


def _precisions(load: Callable[..., Any], seq: int, size: int) -> PrecisionComparison:
    """The step in each precision, on random tokens; in float64 where the model has room for it."""
    batch_of = lambda model: random_batch(innermost(model), size, seq, 0) | {"use_cache": False}

    def exact(model: Any) -> dict[str, torch.Tensor] | None:
        if not whole_fits(innermost(model)):
            return None
        unpatch(model)
        return step(in_float64(model), batch_of(model), reference=True)

    return compare_precisions(load, lambda model: step(model, batch_of(model)), exact)
