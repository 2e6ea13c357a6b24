"""L = log sum_j exp z_j of z = cap tanh(scale (h W^T + b) / cap) / T, without the (tokens, vocabulary) tensor.

    dL/dx_j = p_j c_j,    dL/dh = sum_j p_j c_j W_j = U / A          (c_j = dz_j/dx_j; U, A: the sums of the online
                          softmax)

The row Jacobian depends on its own row of h alone, so with a frozen head the forward accumulates it (two products of 2
tokens H V operations in all, one without gradients); with weight or bias trained, the backward projects again (four).
Tiles and launches are those of `linear_logprob`, with a target outside of the vocabulary: no column is set apart."""

from __future__ import annotations

import torch

from fastft_kernels.lm_head import formula as head_formula
from fastft_kernels.lm_head import online_softmax as osm
from fastft_kernels.lm_head.tiles import (
    HeadTensors,
    check_inputs,
    fold_tokens,
    gradient_tiles,
    no_autocast,
    spans,
    tile_sizes,
)
from fastft_kernels.recompute.recomputation import Recomputation
from fastft_kernels.runtime import higher_order
from fastft_kernels.runtime.dispatch import math_dtype


class _LinearLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, head: HeadTensors, jacobian: bool, recompute: bool, source: Recomputation | None
    ):
        n, wide = hidden.shape[0], math_dtype(hidden.dtype)
        nowhere = torch.full((n,), weight.shape[0], dtype=torch.int64, device=hidden.device)
        j = torch.empty_like(hidden) if jacobian else None
        top, log_sum = (torch.empty(n, dtype=wide, device=hidden.device) for _ in range(2))
        with no_autocast(hidden.device):
            for a, b in spans(n, head.tile[0]):
                state, acc = fold_tokens(hidden[a:b], weight, bias, nowhere[a:b], head, [], jacobian)
                top[a:b], log_sum[a:b] = state[osm.M], state[osm.A].log()
                if jacobian:
                    j[a:b] = acc.div_(state[osm.A].unsqueeze(1))
        ctx.head = head
        again = head_formula.kept(hidden, source)
        ctx.formula, ctx.n_again = None if source is None else source.differentiable, len(again)
        whole = (weight, bias) if again else ()  # for second derivatives
        ctx.save_for_backward(*again, *whole, j, *((hidden, weight, bias, nowhere, top, log_sum) if recompute else ()))
        return top + log_sum

    @staticmethod
    def backward(ctx, g):
        n, saved = ctx.n_again, ctx.saved_tensors
        if n and higher_order.wanted():
            inputs = head_formula.restored(ctx.formula, saved[:n]), *saved[n : n + 2]
            formula = lambda hidden, weight, bias: head_formula.logsumexp(hidden, weight, bias, ctx.head)
            return *higher_order.gradients(formula, inputs, ctx.needs_input_grad[:3], (g,)), *(None,) * 4
        j, *kept = saved[n + 2 :] if n else saved
        if not kept:
            return (None if j is None else torch.mul(j, g.unsqueeze(1), out=torch.empty_like(j))), *(None,) * 6
        hidden, weight, bias, nowhere, top, log_sum = kept
        zero = torch.zeros_like(top)
        coef = torch.stack((top, log_sum, g, zero, zero, zero))
        with no_autocast(hidden.device):
            grads = gradient_tiles(
                hidden, weight, bias, nowhere, coef, torch.ones_like(top), ctx.head, False, ctx.needs_input_grad[:3]
            )
        return *grads, *(None,) * 4


def linear_logsumexp(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """log sum exp over the vocabulary of softcap tanh(scale (hidden W^T + bias) / softcap) / temperature, by token.

    Args:
        hidden, weight, bias: [..., H], [V, H], [V]; bf16, fp16, fp32, fp64. Products and memory as in `linear_logprob`.
        temperature, softcap, scale: numbers of the formula; softcap None: no tanh.
        tile: (tokens, columns) of a tile; None: from the shapes.

    Returns:
        [...] in float32 (float64 for float64 inputs), differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    check_inputs(
        "linear_logsumexp",
        hidden,
        weight,
        torch.empty(hidden.shape[:-1], dtype=torch.int64, device=hidden.device),
        bias,
    )
    h = hidden.reshape(-1, hidden.shape[-1])
    head = HeadTensors(float(scale), softcap, 1.0 / temperature, tile or tile_sizes(h.shape[0], weight.shape[0], h))
    grad = torch.is_grad_enabled()
    recompute = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    return _LinearLogSumExp.apply(
        h,
        weight,
        bias,
        head,
        grad and hidden.requires_grad and not recompute,
        recompute,
        head_formula.source_of(hidden),
    ).reshape(hidden.shape[:-1])
