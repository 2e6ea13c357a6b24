"""One training step, as a Trainer takes it: forward, backward, gradient clipping, the optimizer's step. For fake models
and for real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fastft.compat.trl_private import FUSED, USE_TRITON, add_fused_lm_head
from fastft.errors import PlanError
from fastft.lm_head import trl_head
from fastft.patching.patcher import innermost
from fastft.swapping.rebind import over_globals

LOSSES = ("trl", "model")
TOKEN_TILE, COLUMN_TILE = 4096, 32768  # of TRL's fused head


def forward(model: nn.Module, batch: dict[str, torch.Tensor], loss: str, autocast: torch.dtype | None) -> torch.Tensor:
    """The loss of a batch: "trl", through TRL's fused head (`with_trl_head` before), or "model", the model's own.
    Scalar."""
    device = batch["input_ids"].device.type
    with torch.autocast(device, dtype=autocast) if autocast is not None else contextlib.nullcontext():
        if loss == "model":
            return model(**batch, use_cache=False).loss
        out = model(**batch, **{FUSED: True})
    return -out.log_probs.sum() / out.label_mask.sum().clamp(min=1)


def finish(model: nn.Module, step: Callable[[], object]) -> None:
    """Gradients are clipped to norm 1, which is the Trainer's default; the optimizer steps."""
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    step()


def with_trl_head(base: Any) -> None:
    """What SFTTrainer does to a model. Raises PlanError without TRL."""
    try:
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    except ImportError as e:
        raise PlanError(f'loss="trl" needs TRL 1.16 or newer ({e}): install it, or pass loss="model"') from e


@contextlib.contextmanager
def head_as_on_cuda(base: nn.Module) -> Iterator[None]:
    """Where TRL's fused head is bound on `base`, it takes the way that it takes on CUDA (rows without a label left out,
    tiles in Triton)."""
    undo = []
    for function, put in list(trl_head.places(base.__dict__, "forward")):
        names: dict[str, object] = {USE_TRITON: lambda device: True}
        if function.__globals__.get(trl_head.NAME) is not trl_head.FusedHead:
            names[trl_head.NAME] = _TrlHead
        put(over_globals(function, names))
        undo.append((put, function))
    try:
        yield
    finally:
        for put, function in undo:
            put(function)


class _TrlHead(torch.autograd.Function):
    """What TRL's fused head allocates on CUDA, for stock's plan: one buffer of logits a tile, which its kernels
    overwrite; in the backward also float32 gradients of hidden (and of a weight that trains), which are then cast.
    Shapes and dtypes alone: no arithmetic."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk, softcap=None, logit_scale=1.0, outputs=()):
        ctx.dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            ctx.dtype = torch.get_autocast_dtype(hidden.device.type)
        rows = [hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(8)]
        _TrlHead._tile(hidden, weight, ctx.dtype)
        ctx.save_for_backward(hidden, weight, targets, rows[0])
        return rows[1], None, None, None, rows[2].bool()

    @staticmethod
    def _tile(hidden, weight, dtype):
        n = min(hidden.shape[0], TOKEN_TILE)
        buffer = hidden.new_empty((n, min(COLUMN_TILE, weight.shape[0])), dtype=dtype)
        return buffer, hidden[:n].to(dtype), weight[:COLUMN_TILE].to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # pyright: ignore[reportIncompatibleMethodOverride]  (torch's decorator is untyped)
        hidden, weight, _, _ = ctx.saved_tensors
        d_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        d_weight = weight.new_empty(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        kept = _TrlHead._tile(hidden, weight, ctx.dtype)
        del kept
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            *(None,) * 7,
        )


def trains_through_base(model: nn.Module) -> None:
    """Frozen embeddings under checkpointing: what TRL's trainers do for adapters."""
    base = innermost(model)
    if base is not model and hasattr(base, "enable_input_require_grads"):
        base.enable_input_require_grads()
