"""Cross-entropy of softmax(z), z = cap tanh(scale (h W^T + b) / cap) / T, without the (tokens, vocabulary) tensor.
By row,

    loss = -(1 - s) log p_t - s (mean z - lse) + k lse^2,      lse = log sum_j exp z_j,  s: label_smoothing,  k: z_loss
    dz_j = a p_j - s / V (j != t),    dz_t = -w + s + 2 k lse p_t - s / V,    a = 1 + 2 k lse,    w = 1 - p_t  (nothing
                                      cancels)

which has the form that `linear_logprob` tiles: four ways, chosen by what needs gradients.

value      nothing: one product.
jacobian   hidden alone, s = 0: J = dz_t c_t W_t + a w U / A with the sums of the online softmax. Two products.
resident   hidden alone with s > 0; or weight or bias with a mean or a sum, whose gradient is one number for all rows.
           The float32 logits of few tokens and all columns are kept until their log-sum-exp is known, then turned into
           dz: two products for hidden, three with dW, which is summed over the token tiles in float32 and kept for the
           backward to multiply.
recompute  weight or bias with a gradient by row (reduction "none"), or a dW in float32 too large to keep: four
           products.

Every choice is a function of shapes and dtypes, never of the free memory: the same inputs give the same bits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastft_kernels.lm_head import formula as head_formula
from fastft_kernels.lm_head import online_softmax as osm
from fastft_kernels.lm_head.tiles import (
    TOKEN_TILE,
    HeadTensors,
    Stats,
    addmm32,
    bias_part,
    check_inputs,
    check_tile,
    even_tile,
    flat_target,
    float16_range,
    gradient_tiles,
    mm32,
    no_autocast,
    operand,
    part_of,
    project,
    put,
    resolve_compact,
    scaled_rows,
    select_rows,
    spans,
    statistics,
    sweep,
    take,
    tile_sizes,
)
from fastft_kernels.recompute.recomputation import Recomputation
from fastft_kernels.runtime import higher_order
from fastft_kernels.runtime.dispatch import math_dtype

REDUCTIONS = ("mean", "sum", "none")
RESIDENT_BYTES = 384 << 20
WEIGHT_GRADIENT_BYTES = 1 << 30


class TilePlan(NamedTuple):
    """What one call does. total: return the sum of the losses; need: which of hidden, weight, bias get a gradient."""

    head: HeadTensors
    smoothing: float
    z_loss: float
    mode: str
    total: bool
    need: tuple[bool, bool, bool]
    compact: bool


def _losses(s: Stats, state: torch.Tensor, plan: TilePlan, vocab: int) -> torch.Tensor:
    """Of each row; in float64 where they are smoothed: the smoothing's terms are large, and cancel."""
    if plan.smoothing and state.device.type != "mps":  # which has no float64
        state = state.double()
        s = statistics(state)
    loss = -s.log_p
    if plan.smoothing:
        loss = loss * (1 - plan.smoothing) - plan.smoothing * ((state[osm.SUM] / vocab - s.top) - s.log_sum)
    if plan.z_loss:
        loss = loss + plan.z_loss * (s.top + s.log_sum).square()
    return loss


def _dz(s: Stats, plan: TilePlan, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, dz_t) by row."""
    a, dz_t = torch.ones_like(s.w), -s.w
    if plan.z_loss:
        of_lse = (2 * plan.z_loss) * (s.top + s.log_sum)
        a, dz_t = a + of_lse, dz_t + of_lse * s.log_p.exp()
    return a, dz_t + (plan.smoothing - plan.smoothing / vocab) if plan.smoothing else dz_t


def _coefficients(s: Stats, plan: TilePlan, vocab: int, g: torch.Tensor | None) -> torch.Tensor:
    """(6, n) of `dlogits`, times g by row."""
    zero = torch.zeros_like(s.w)
    a, dz_t = _dz(s, plan, vocab)
    rows = torch.stack((a, zero, zero - plan.smoothing / vocab, dz_t))
    return torch.cat((torch.stack((s.top, s.log_sum)), rows if g is None else rows * g))


def _row_size(s: Stats, plan: TilePlan) -> torch.Tensor:
    """Size of a row of dz: J is kept divided by it (float16 does not keep 1e-8)."""
    size = s.w + (2 * plan.z_loss) * (s.top + s.log_sum).abs() if plan.z_loss else s.w
    return torch.where(size == 0, 1.0, size)


def _resident(h, weight, bias, target, plan: TilePlan):
    """(losses (n,), J or None, its row scales or None, dW or None, db or None) of the sum of the losses; dW and db in
    float32."""
    head, (need_h, need_w, need_b) = plan.head, plan.need
    dtype, f32, vocab = h.dtype, math_dtype(h.dtype), weight.shape[0]
    j = torch.empty_like(h) if need_h else None
    dw = torch.zeros_like(weight, dtype=f32) if need_w else None
    db = torch.zeros_like(bias, dtype=f32) if need_b else None
    losses, scales = [h.new_zeros(0, dtype=f32)], []
    for a, b in spans(h.shape[0], head.tile[0]):
        t, x = target[a:b], operand(h[a:b], dtype)
        state, kept = None, []
        for c, d in spans(vocab, head.tile[1]):
            kept.append(project(x, weight, (c, d), dtype)[0])
            optional = [osm.SUM] if plan.smoothing else []
            _, _, state = osm.fold(kept[-1], part_of(bias, c, d), t, state, c, *head.z, None, optional)
        s = statistics(state)
        losses.append(_losses(s, state, plan, vocab))
        s = Stats(*(y.masked_fill(t < 0, 0) for y in s))
        coef, scale, total = float16_range(_coefficients(s, plan, vocab, None), s.w, dtype)
        if scale is not None:
            scales.append(scale)
        acc, x = None, operand(scaled_rows(h[a:b], scale, total), dtype)
        for c, d in spans(vocab, head.tile[1]):
            dx = osm.dlogits(kept.pop(0), part_of(bias, c, d), t, coef, c, *head.z, False, dtype)
            if need_b:
                part = bias_part(dx, scale, total)
                db[c:d] += part if total is None else part * total
            dx = operand(dx, dtype)
            if need_h:
                acc = addmm32(acc, dx, operand(weight[c:d], dtype))
            if need_w and total is None:
                addmm32(dw[c:d], dx.t(), x)
            elif need_w:
                dw[c:d] += mm32(dx.t(), x) * total
            del dx
        if need_h:
            j[a:b] = acc
    return torch.cat(losses), j, torch.cat(scales) if scales else None, dw, db


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, plan: TilePlan, source: Recomputation | None):
        rows = select_rows(target, plan.compact)
        h, t = take(hidden, rows), take(target, rows)
        ignored, vocab = t < 0, weight.shape[0]
        saved: tuple = ()
        with no_autocast(hidden.device):
            if plan.mode == "resident":
                losses, j, scale, dw, db = _resident(h, weight, bias, t, plan)
                factor = torch.ones_like(losses) if scale is None else scale
                saved = (j, factor.masked_fill(ignored, 0), dw, db)
            else:

                def factors(s: Stats):
                    a, dz_t = _dz(s, plan, vocab)
                    size = _row_size(s, plan)
                    return dz_t / size, s.w * a / size

                optional = [osm.SUM] if plan.smoothing else []
                state, j = sweep(h, weight, bias, t, plan.head, optional, plan.mode == "jacobian", factors)
                s = statistics(state)
                losses = _losses(s, state, plan, vocab)
                if plan.mode == "jacobian":
                    saved = (j, _row_size(s, plan).masked_fill(ignored, 0), None, None)
                elif plan.mode == "recompute":
                    saved = (hidden, weight, bias, target, *s)
        losses = losses.masked_fill(ignored, 0)
        ctx.plan, ctx.n, ctx.dtypes = plan, hidden.shape[0], (weight.dtype, None if bias is None else bias.dtype)
        again = () if plan.mode == "value" else head_formula.kept(hidden, source)
        ctx.formula, ctx.n_again = None if source is None else source.differentiable, len(again)
        whole = (weight, bias, target) if again else ()  # for second derivatives
        ctx.save_for_backward(*again, *whole, rows, *saved)
        f32 = math_dtype(hidden.dtype)
        return losses.sum().to(f32) if plan.total else put(losses.to(f32), rows, hidden.shape[0])

    @staticmethod
    def backward(ctx, g):
        plan, n, kept = ctx.plan, ctx.n_again, ctx.saved_tensors
        if n and higher_order.wanted():
            hidden, (weight, bias, target) = head_formula.restored(ctx.formula, kept[:n]), kept[n : n + 3]

            def formula(hidden, weight, bias):
                loss = head_formula.losses(hidden, weight, bias, target, plan.head, plan.smoothing, plan.z_loss)
                return loss.sum() if plan.total else loss

            return *higher_order.gradients(formula, (hidden, weight, bias), plan.need, (g,)), None, None, None
        rows, *saved = kept[n + 3 :] if n else kept
        g = take(g, rows) if g.dim() else g
        dh = dw = db = None
        if plan.mode == "recompute":
            hidden, weight, bias, target, *s = saved
            h, t = take(hidden, rows), take(target, rows)
            s = Stats(*(x.masked_fill(t < 0, 0) for x in s))
            coef = _coefficients(s, plan, weight.shape[0], torch.where(t < 0, 0.0, g))
            with no_autocast(hidden.device):
                dh, dw, db = gradient_tiles(h, weight, bias, t, coef, s.w, plan.head, False, plan.need)
        else:
            j, factor, dw, db = saved
            if plan.need[0]:
                dh = torch.empty_like(j)
                torch.mul(j, torch.where(factor == 0, 0.0, g * factor).unsqueeze(1), out=dh)
            if dw is not None or db is not None:
                g = torch.where((factor != 0).any(), g, 0.0)  # no row counts: 0 even where g is a division by 0
            dw, db = (_times(x, g, dtype) for x, dtype in zip((dw, db), ctx.dtypes))
        return None if dh is None else put(dh, rows, ctx.n), dw, db, None, None, None


def _times(x: torch.Tensor | None, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """x g in dtype, one pass."""
    return None if x is None else torch.mul(x, g, out=torch.empty_like(x, dtype=dtype))


def keeps_weight_gradient(tokens: int, weight: torch.Tensor) -> bool:
    """Is dW kept in float32 from forward to backward? Where it takes at most WEIGHT_GRADIENT_BYTES, or no more than the
    float32 logits and their gradient that a head without tiles keeps for these tokens (from tokens = H / 2 on)."""
    vocab, hidden = weight.shape
    return 4 * vocab * hidden <= max(WEIGHT_GRADIENT_BYTES, 8 * tokens * vocab)


def _shifted(target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """target[..., 1:] with an ignored last column: hidden needs no slice, which would be a copy."""
    return torch.cat((target[..., 1:], torch.full_like(target[..., :1], ignore_index)), -1)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items_in_batch: int | torch.Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    compact: bool | None = None,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Cross-entropy of softmax(softcap tanh(scale (hidden W^T + bias) / softcap) / temperature) and target.

    Args:
        hidden, weight, target, bias: [..., H], [V, H], [...] int64, [V]; bf16, fp16, fp32, fp64.
        reduction: "mean" divides by the number of targets that are not ignored (where all are: nan, and gradients of 0,
            as torch.nn.functional.cross_entropy's), or by num_items_in_batch; "sum"; "none" (0 in ignored rows).
        num_items_in_batch: a number, or a tensor of one element.
        label_smoothing: as in torch.nn.functional.cross_entropy.
        z_loss: adds z_loss * logsumexp(z)^2.
        shift: position i is scored against target[..., i + 1], the last against none; "none" then gives [..., length -
            1].
        temperature, softcap, scale: numbers of the formula; softcap None: no tanh.
        ignore_index, compact, tile, and indices outside of the vocabulary: as in `linear_logprob`.

    Returns:
        float32 (float64 for float64 inputs): a number or, for reduction "none", of target's shape. Differentiable in
        hidden, weight and bias.

    Raises:
        TypeError, ValueError: dtypes, shapes or arguments do not fit.
        IndexError: as `linear_logprob`.

    Units of 2 tokens H V operations, forward and backward: 1 without gradients; 2 for hidden alone; 3 with weight
    trained and a mean or a sum (dW is kept in float32 from forward to backward); 4 with weight trained and "none", or
    where dW in float32 takes more than 1 GiB and tokens < H / 2 (see `keeps_weight_gradient`). Memory beyond inputs,
    outputs and what is saved: as `linear_logprob`, or RESIDENT_BYTES of logits and one tile of dz.
    """
    name = "linear_cross_entropy"
    check_inputs(name, hidden, weight, target, bias)
    check_tile(name, tile)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: want reduction in {REDUCTIONS}, got {reduction!r}")
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(f"{name}: num_items_in_batch divides a mean, got reduction {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: want label_smoothing in [0, 1], got {label_smoothing}")
    if shift and target.dim() == 0:
        raise ValueError(f"{name}: shift wants a dimension of positions")
    flat = flat_target(name, _shifted(target, ignore_index) if shift else target, weight.shape[0], ignore_index)
    h = hidden.reshape(-1, hidden.shape[-1])
    grad = torch.is_grad_enabled()
    need = (
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )
    trained, total = need[1] or need[2], False
    if trained:
        total = reduction != "none" and keeps_weight_gradient(h.shape[0], weight)
        mode = "resident" if total else "recompute"
    else:
        mode = "value" if not need[0] else "resident" if label_smoothing else "jacobian"
    token_tile, vocab_tile = tile or tile_sizes(h.shape[0], weight.shape[0], h)
    if mode == "resident" and tile is None:
        cap = max(RESIDENT_BYTES // (4 * weight.shape[0]) // 128 * 128, 128)
        token_tile = even_tile(h.shape[0], min(cap, TOKEN_TILE), 128)
    head = HeadTensors(float(scale), softcap, 1.0 / temperature, (token_tile, vocab_tile))
    plan = TilePlan(head, label_smoothing, z_loss, mode, total, need, resolve_compact(compact, flat))
    loss = _LinearCrossEntropy.apply(h, weight, bias, flat, plan, head_formula.source_of(hidden))
    if reduction == "none":
        loss = loss.reshape(target.shape)
        return loss[..., :-1] if shift else loss
    loss = loss if total else loss.sum()
    if reduction == "sum":
        return loss
    if num_items_in_batch is None:
        counted = (flat >= 0).sum()
        # so that no gradient is nan, as stock's
        return torch.where(counted == 0, math.nan, loss / counted.clamp(min=1))
    return loss / (
        num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, torch.Tensor) else num_items_in_batch
    )
