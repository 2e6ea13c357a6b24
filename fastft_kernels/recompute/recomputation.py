"""How a tensor can be recomputed in a backward instead of being saved by the function that consumes it.

The output y of a swapped norm is a cheap function of tensors the norm saves anyway (its input, 1/rms, its weight). A
function
that is given y and needs it in its backward saves those tensors in place of y: no further bytes, one elementwise
launch.

    producer   y = norm(x);  attach(y, Recomputation((x, rstd, weight), recompute, formula))
    consumer   recomputation = recomputation_of(y);  ctx.save_for_backward(*(recomputation.tensors if recomputation else
               (y,)))    (never ctx.recomputation: it would outlive them)

A recomputation holds for the tensor object it was attached to, at the version it had then: an in-place change of y
voids it. In-place changes of the recomputation's own tensors are caught by autograd's version check when the consumer's
backward unpacks them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastft_kernels.runtime.compat import is_dynamo_compiling


@dataclass
class Recomputation:
    """`recompute(*tensors)` gives the tensor again: same shape, same dtype, same bits.

    tensors: saved for backward by another function anyway, with the graph they come from, which second derivatives
    follow;
    recompute: pure, and holds no tensor itself. formula: the same values to rounding, differentiable; None: recompute
    is. rounded: the tensor's rows in e4m3 and their scales, for the first consumer that multiplies in FP8 and takes
    them. producer: what makes such tensors; `take_rounded` tells it that they were wanted."""

    tensors: tuple[torch.Tensor, ...]
    recompute: Callable[..., torch.Tensor]
    formula: Callable[..., torch.Tensor] | None = None
    rounded: tuple[torch.Tensor, torch.Tensor] | None = None
    producer: Any = None

    @property
    def differentiable(self) -> Callable[..., torch.Tensor]:
        return self.formula or self.recompute


ASKED = 2  # calls for which a producer rounds what it makes after it was asked to


def take_rounded(recomputation: Recomputation | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The rows in e4m3 that the producer left, which belong to the caller then; None where it left none. Next time it
    does, if it can: it has an attribute `asked`, counted down by a call of its own."""
    if recomputation is None or recomputation.producer is None:
        return None
    recomputation.producer.asked = ASKED
    rounded, recomputation.rounded = recomputation.rounded, None
    return rounded


def attach(y: torch.Tensor, recomputation: Recomputation) -> None:
    """Remember on the tensor object y how to recompute it. Does nothing while compiling, or where no graph is being
    built."""
    if is_dynamo_compiling() or not torch.is_grad_enabled():
        return
    carrier: Any = y
    carrier._fastft_recomputation = (recomputation, y._version)


def recomputation_of(x: torch.Tensor) -> Recomputation | None:
    """The recomputation attached to this tensor object; None if there is none, or if x was changed in place since."""
    if is_dynamo_compiling():
        return None
    recomputation, version = getattr(x, "_fastft_recomputation", (None, 0))
    return recomputation if recomputation is not None and x._version == version else None
