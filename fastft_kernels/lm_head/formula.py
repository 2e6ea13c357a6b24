"""What the tiled head computes, from whole logits in plain torch: what `higher_order` evaluates, differentiable any
number of times.

hidden (n, H), target (n,) with -1 where ignored; only rows that count are projected. float32 (float64 of float64) from
operands in hidden's dtype, as in the tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastft_kernels.lm_head.online_softmax import transform_ref
from fastft_kernels.lm_head.tiles import HeadTensors, no_autocast
from fastft_kernels.recompute.recomputation import Recomputation, recomputation_of
from fastft_kernels.runtime.compat import viewed
from fastft_kernels.runtime.dispatch import math_dtype


def source_of(hidden: torch.Tensor) -> Recomputation | None:
    """How a backward that does not save hidden gets it for second derivatives: its recomputation, whose tensors live
    anyway, or that of the tensor of which it is a view (a slice of the tokens, all of them as rows)."""
    if torch.compiler.is_compiling() or not (hidden.requires_grad and torch.is_grad_enabled()):
        return None
    recomputation, base = recomputation_of(hidden), viewed(hidden)
    if recomputation is not None or base is None or base.dtype != hidden.dtype:
        return recomputation
    recomputation = recomputation_of(base)
    return None if recomputation is None else _viewed(recomputation, base, hidden)


def _viewed(recomputation: Recomputation, base: torch.Tensor, view: torch.Tensor) -> Recomputation:
    strides, geometry = base.stride(), (view.shape, view.stride(), view.storage_offset() - base.storage_offset())
    whole_again = recomputation.differentiable

    def again(*tensors: torch.Tensor) -> torch.Tensor:
        whole = whole_again(*tensors)
        if whole.stride() != strides:
            whole = torch.empty_strided(whole.shape, strides, dtype=whole.dtype, device=whole.device).copy_(whole)
        shape, stride, offset = geometry
        return whole.as_strided(shape, stride, whole.storage_offset() + offset)

    return Recomputation(recomputation.tensors, again)


def kept(hidden: torch.Tensor, source: Recomputation | None) -> tuple[torch.Tensor, ...]:
    """What to save of hidden for second derivatives; nothing while compiling, where none is taken."""
    if torch.compiler.is_compiling():
        return ()
    return (hidden,) if source is None else source.tensors


def restored(formula, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """hidden (n, H) again, connected."""
    hidden = tensors[0] if formula is None else formula(*tensors)
    return hidden.reshape(-1, hidden.shape[-1])


def logits(hidden, weight, bias, head: HeadTensors) -> torch.Tensor:
    """z (n, V)."""
    wide = math_dtype(hidden.dtype)
    with no_autocast(hidden.device):
        x = hidden.to(wide) @ weight.to(hidden.dtype).to(wide).t()
    return transform_ref(x, bias, *head.z)[0]


def logsumexp(hidden, weight, bias, head: HeadTensors) -> torch.Tensor:
    """log-sum-exp of the transformed logits in plain PyTorch, differentiable twice. hidden [n, H], weight [V, H];
    returns [n]."""
    return logits(hidden, weight, bias, head).logsumexp(-1)


def _by_row(hidden, weight, bias, target, head: HeadTensors, rows) -> tuple[torch.Tensor, ...]:
    """rows(z, log softmax, log p_t) of the rows that count, 0 in the others."""
    counted = (target >= 0).nonzero().squeeze(1)
    t = target[counted].unsqueeze(1)
    z = logits(hidden[counted], weight, bias, head)
    log_p = z.log_softmax(-1)
    at_target = log_p.gather(1, t.clamp(max=z.shape[1] - 1)).masked_fill(t >= z.shape[1], float("nan")).squeeze(1)
    return tuple(y.new_zeros(target.shape[0]).index_copy(0, counted, y) for y in rows(z, log_p, at_target))


def log_probs(hidden, weight, bias, target, head: HeadTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p_t, entropy) by row."""

    def rows(z, log_p, at_target):
        p = log_p.exp()
        return at_target, -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)

    return _by_row(hidden, weight, bias, target, head, rows)


def losses(hidden, weight, bias, target, head: HeadTensors, smoothing: float, z_loss: float) -> torch.Tensor:
    """The cross-entropy by row."""

    def rows(z, log_p, at_target):
        loss = -at_target
        if smoothing:
            loss = loss * (1 - smoothing) - smoothing * log_p.mean(-1)
        if z_loss:
            loss = loss + z_loss * z.logsumexp(-1).square()
        return (loss,)

    return _by_row(hidden, weight, bias, target, head, rows)[0]
