"""log p(target) of softmax(z), z = cap tanh(scale (h W^T + b) / cap) / T, without the (tokens, vocabulary) tensor.

Let m and A be the maximum and the sum of exp(z_j - m) over the *other* columns j != t, and L = m + log A. Then

    log p_t = -softplus(L - z_t),     w = 1 - p_t = sigmoid(L - z_t)             (no cancellation as p_t -> 1)
    dlog p_t/dh = sum_j ([j = t] - p_j) c_j W_j = w (c_t W_t - U / A),           U = sum_{j != t} exp(z_j - m) c_j W_j

with c_j = dz_j/dx_j = (scale / T)(1 - tanh^2). log p_t depends on its own row of h alone, so whatever gradient g
arrives, dh_i = g_i J_i. With a frozen head the forward therefore accumulates U beside A (online softmax over vocabulary
tiles), and saves J / w in h's dtype and w in float32 (and for second derivatives what recomputes h, which lives anyway,
or h where nothing does): two matrix products of 2 tokens H V operations in all, forward and backward; one without
gradients. p is rounded relative to the largest *other* probability, so J keeps its relative precision where 1 - p_t is
1e-6, and in float16.

Weight or bias trained, or a gradient for the entropy: the backward projects again and forms the logits' gradient
tile by tile,
    dz_j = -g p_j - g_H p_j (z_j - mu) (j != t),      dz_t = g w - g_H p_t (z_t - mu),      mu = sum_j p_j z_j
(with dh and dW four products in all).

Logits are float32 from 16-bit operands (torch.mm with out_dtype on CUDA; operands cast tile by tile elsewhere),
accumulators are float32. Nothing is added atomically: the same inputs and tiles give the same bits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastft_kernels.lm_head import formula as head_formula
from fastft_kernels.lm_head import online_softmax as osm
from fastft_kernels.lm_head.tiles import (
    HeadTensors,
    Stats,
    check_inputs,
    check_tile,
    flat_target,
    gradient_tiles,
    inverse_sum,
    no_autocast,
    put,
    resolve_compact,
    select_rows,
    statistics,
    sweep,
    take,
    tile_sizes,
)
from fastft_kernels.recompute.recomputation import Recomputation
from fastft_kernels.runtime import higher_order

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_STATE_OF = {"entropy": osm.PZ, "log_sum_sq_probs": osm.SQ, "mean_logits": osm.SUM, "is_top1": osm.BEFORE}


class LogProbs(NamedTuple):
    """Per-token results, each of target's shape, None where not asked. float32 (float64 for float64 inputs); is_top1 is
    bool."""

    log_probs: torch.Tensor | None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


# by row


def mean_below(state: torch.Tensor, s: Stats) -> torch.Tensor:
    """sum_j p_j (z_j - max z) <= 0. The entropy is log_sum less this: nothing cancels."""
    others = torch.where(s.w == 0, 0.0, s.w * ((state[osm.M] - s.top) + state[osm.PZ] * inverse_sum(state)))
    return others + torch.where(s.w == 1, 0.0, s.log_p.exp() * s.below)


def _optional_outputs(state, s: Stats, vocab: int, outputs: tuple[str, ...]) -> dict[str, torch.Tensor]:
    got = {}
    log_a = state[osm.A].log()
    if "entropy" in outputs:
        got["mean_below"] = mean_below(state, s)
        got["entropy"] = s.log_sum - got["mean_below"]
    if "log_sum_sq_probs" in outputs:
        others = 2 * s.log_w + (state[osm.SQ].log() - 2 * log_a)
        got["log_sum_sq_probs"] = torch.where(s.w == 0, 2 * s.log_p, torch.logaddexp(2 * s.log_p, others))
    if "mean_logits" in outputs:
        got["mean_logits"] = state[osm.SUM] / vocab
    if "is_top1" in outputs:
        got["is_top1"] = (state[osm.ZT] >= state[osm.M]) & (state[osm.ZT] > state[osm.BEFORE])
    return got


def row_coefficients(s: Stats, mu, g, g_entropy) -> torch.Tensor:
    """(6, n) of `dlogits` for upstream gradients g of log_probs and g_entropy of the entropy (either may be None);
    mu: `mean_below`."""
    zero = torch.zeros_like(s.w)
    p1, p2, at_target = zero, zero, zero
    if g is not None:
        p1, at_target = -g, g * s.w
    if g_entropy is not None:
        p1, p2 = p1 + g_entropy * mu, -g_entropy
        at_target = at_target - torch.where(s.w == 1, 0.0, g_entropy * s.log_p.exp() * (s.below - mu))
    return torch.stack((s.top, s.log_sum, p1, p2, zero, at_target))


# autograd


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        target,
        head: HeadTensors,
        outputs: tuple[str, ...],
        jacobian: bool,
        compact: bool,
        source: Recomputation | None,
    ):
        ctx.set_materialize_grads(False)
        rows = select_rows(target, compact)
        h, t = take(hidden, rows), take(target, rows)
        with no_autocast(hidden.device):
            state, j = sweep(h, weight, bias, t, head, [_STATE_OF[o] for o in outputs if o in _STATE_OF], jacobian)
        s = statistics(state)
        got = {"log_probs": s.log_p, **_optional_outputs(state, s, weight.shape[0], outputs)}
        n = hidden.shape[0]
        ignored = t < 0
        results = [put(got[o].masked_fill(ignored, 0), rows, n) if o in got and o in outputs else None for o in OUTPUTS]
        ctx.mark_non_differentiable(*(x for x in results[2:] if x is not None))
        ctx.head, ctx.n = head, n
        ctx.shape = tuple(hidden.shape)
        recompute = not jacobian or "entropy" in outputs
        kept = (hidden, weight, bias, target, got.get("mean_below"), *s) if recompute else ()
        again = head_formula.kept(hidden, source)
        ctx.formula, ctx.n_again = None if source is None else source.differentiable, len(again)
        whole = (weight, bias, target) if again else ()  # for second derivatives
        ctx.save_for_backward(*again, *whole, j, s.w.masked_fill(ignored, 0), rows, *kept)
        return tuple(results)

    @staticmethod
    def backward(ctx, g, g_entropy, *_):
        need, n, saved = ctx.needs_input_grad[:3], ctx.n_again, ctx.saved_tensors
        if g is None and g_entropy is None:
            return (None,) * 9
        if n and higher_order.wanted():
            hidden, (weight, bias, target) = head_formula.restored(ctx.formula, saved[:n]), saved[n : n + 3]
            formula = lambda hidden, weight, bias: head_formula.log_probs(hidden, weight, bias, target, ctx.head)
            return *higher_order.gradients(formula, (hidden, weight, bias), need, (g, g_entropy)), *(None,) * 6
        j, w, rows, *kept = saved[n + 3 :] if n else saved
        if g_entropy is None and j is not None:
            f = torch.where(w == 0, 0.0, take(g, rows) * w)
            dh = torch.empty_like(j)
            torch.mul(j, f.unsqueeze(1), out=dh)
            return put(dh, rows, ctx.n), *(None,) * 8
        hidden, weight, bias, target, mu, *s = kept
        h, t = take(hidden, rows), take(target, rows)
        g = None if g is None else take(g, rows).to(w.dtype)
        g_entropy = None if g_entropy is None else take(g_entropy, rows).to(w.dtype)
        coef = row_coefficients(Stats(*s), mu, g, g_entropy)
        coef = torch.where(t < 0, 0.0, coef)
        with no_autocast(hidden.device):
            dh, dw, db = gradient_tiles(h, weight, bias, t, coef, w, ctx.head, g_entropy is not None, need)
        return None if dh is None else put(dh, rows, ctx.n), dw, db, *(None,) * 6


# public


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("log_probs",),
    compact: bool | None = None,
    tile: tuple[int, int] | None = None,
) -> LogProbs:
    """Per-token log-probability of `target` under softmax(softcap tanh(scale (hidden W^T + bias) / softcap) /
    temperature).

    Args:
        hidden, weight, target, bias: [..., H], [V, H], [...] int64, [V]; bf16, fp16, fp32, fp64. Products run in
            hidden's dtype (weight tiles are cast to it), whatever autocast says.
        temperature, softcap, scale: numbers of the formula; softcap None: no tanh.
        ignore_index: rows with this target give 0 (is_top1: False) and no gradient.
        outputs: what to compute among `log_probs`, `entropy`, `log_sum_sq_probs` = log sum p^2, `mean_logits` = mean of
            z over the vocabulary, `is_top1` = target is the (first) largest.
        compact: leave ignored rows out of all products. Their number is needed on the host, which on a GPU waits for
            the work queued before: worth it where many rows are ignored. None: on a CPU only. Never while tracing or
            under fake tensors.
        tile: (tokens, columns) of a tile; None: from the shapes, see `tile_sizes`.

    Returns:
        LogProbs: for each of `outputs` a tensor of target's shape, float32 (float64 for float64 inputs), bool for
        `is_top1`; None for the others. `log_probs` and `entropy` are differentiable in hidden, weight and bias, the
        others are not. A column with z = -inf adds nothing to the entropy.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit.
        IndexError: an index is outside of the vocabulary, on a CPU; on a GPU its row is NaN, as asking would wait for
            the device.

    Units of 2 tokens H V operations, forward and backward: 1 without gradients; 2 with frozen weight and bias (4 when a
    gradient for the entropy arrives); 4 with weight trained. Memory beyond inputs (hidden stays alive where it has no
    recomputation), outputs and the saved J (hidden's size and dtype), with tiles (bt, bv) and b bytes an element: bt
    (bv (4 + b) + 4 H) + 60 tokens; at most 0.25 GiB for H = 4096 in bf16. A trained weight adds 4 H (bv + tokens), the
    float32 accumulators. Off CUDA the float32 casts of 16-bit operands add 4 (bt bv + bv H + bt H).
    """
    check_inputs("linear_logprob", hidden, weight, target, bias)
    check_tile("linear_logprob", tile)
    if not set(outputs) <= set(OUTPUTS):
        raise ValueError(f"linear_logprob: want outputs among {OUTPUTS}, got {tuple(outputs)}")
    outputs = tuple(outputs)
    flat = flat_target("linear_logprob", target, weight.shape[0], ignore_index)
    h = hidden.reshape(-1, hidden.shape[-1])
    head = HeadTensors(float(scale), softcap, 1.0 / temperature, tile or tile_sizes(h.shape[0], weight.shape[0], h))
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    jacobian = (
        torch.is_grad_enabled()
        and hidden.requires_grad
        and not trained
        and bool({"log_probs", "entropy"} & set(outputs))
    )
    got = _LinearLogProb.apply(
        h, weight, bias, flat, head, outputs, jacobian, resolve_compact(compact, flat), head_formula.source_of(hidden)
    )
    return LogProbs(*(None if x is None else x.reshape(target.shape) for x in got))
