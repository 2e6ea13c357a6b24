"""Second derivatives: a backward that is itself asked to be differentiable (create_graph=True) runs the plain formula
instead.

The hand-derived gradients of this package carry no graph. The engine runs a backward with gradients enabled only where
its caller wants to differentiate the result again; then `gradients` evaluates the function's formula in plain torch on
the saved inputs, which are connected to the graph they came from, and returns torch's own gradients of it: the first
derivatives to rounding, and all higher ones. Time and memory are then those of the formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastft_kernels.runtime.compat import is_dynamo_compiling


def wanted() -> bool:
    """Asked inside a backward: will its result be differentiated?"""
    return not is_dynamo_compiling() and torch.is_grad_enabled()


def gradients(
    formula: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
    upstream: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """For each input that needs one, the gradient of formula(*inputs) under `upstream` (one for each output, or None),
    differentiable in inputs and upstream. inputs: as unpacked from ctx.saved_tensors."""
    aliases = [x.view_as(x) if x is not None and need else x for x, need in zip(inputs, needs)]
    aliases = [a if not need or a is None or a.requires_grad else a.requires_grad_() for a, need in zip(aliases, needs)]
    outs = formula(*aliases)
    outs = (outs,) if isinstance(outs, torch.Tensor) else outs
    live = [(out, g) for out, g in zip(outs, upstream) if g is not None and out.requires_grad]
    sought = [a for a, need in zip(aliases, needs) if need]
    if not live or not sought:
        return [None] * len(inputs)
    ys, gs = zip(*live)
    found = iter(
        torch.autograd.grad(ys, sought, [g.to(y.dtype) for y, g in live], create_graph=True, allow_unused=True)
    )
    del gs
    return [next(found) if need else None for need in needs]
