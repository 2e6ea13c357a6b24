"""log p(target) of softmax(z), z = cap tanh(scale (h W^T + b) / cap) / T, without the (tokens, vocabulary) tensor.

Let m and A be the maximum and the sum of exp(z_j - m) over the *other* columns j != t, and L = m + log A. Then

    log p_t = -softplus(L - z_t),     w = 1 - p_t = sigmoid(L - z_t)             (no cancellation as p_t -> 1)
    dlog p_t/dh = sum_j ([j = t] - p_j) c_j W_j = w (c_t W_t - U / A),           U = sum_{j != t} exp(z_j - m) c_j W_j

with c_j = dz_j/dx_j = (scale / T)(1 - tanh^2). log p_t depends on its own row of h alone, so whatever gradient g arrives,
dh_i = g_i J_i. With a frozen head the forward therefore accumulates U beside A (online softmax over vocabulary tiles), and saves
J / w in h's dtype and w in float32, in place of h: two matrix products of 2 tokens H V operations in all, forward and backward;
one without gradients. p is rounded relative to the largest *other* probability, so J keeps its relative precision where
1 - p_t is 1e-6, and in float16.

Weight or bias trained, or a gradient for the entropy: the backward projects again and forms the logits' gradient tile by tile,
    dz_j = -g p_j - g_H p_j (z_j - mu) (j != t),      dz_t = g w - g_H p_t (z_t - mu),      mu = sum_j p_j z_j
(with dh and dW four products in all).

Logits are float32 from 16-bit operands (torch.mm with out_dtype on CUDA; operands cast tile by tile elsewhere), accumulators are
float32. Nothing is added atomically: the same inputs and tiles give the same bits."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastft_kernels import online_softmax as osm
from fastft_kernels._runtime import math_dtype

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_STATE_OF = {"entropy": osm.PZ, "log_sum_sq_probs": osm.SQ, "mean_logits": osm.SUM, "is_top1": osm.BEFORE}
TOKEN_TILE, VOCAB_TILE = 4096, 8192
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class LogProbs(NamedTuple):
    """Per-token results, each of target's shape, None where not asked. float32 (float64 for float64 inputs); is_top1 is bool."""

    log_probs: torch.Tensor | None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


class Head(NamedTuple):
    """What turns x = h W^T into z, and the tile sizes."""

    scale: float
    softcap: float | None
    inv_t: float
    tile: tuple[int, int]  # tokens, columns

    @property
    def z(self) -> tuple[float, float | None, float]:
        return self.scale, self.softcap, self.inv_t


class Stats(NamedTuple):
    """Per row: log p_t, log(1 - p_t), 1 - p_t; the largest z; log-sum-exp of all columns less it, z_t less it."""

    log_p: torch.Tensor
    log_w: torch.Tensor
    w: torch.Tensor
    top: torch.Tensor
    log_sum: torch.Tensor
    below: torch.Tensor


# --------------------------------------------------------------------------------------------------------------------- tiles


def _even(n: int, cap: int, multiple: int) -> int:
    """Size of the fewest equal tiles of at most `cap` that cover n, rounded up to `multiple`."""
    if n <= cap:
        return max(n, 1)
    size = -(-n // -(-n // cap))
    return min(-(-size // multiple) * multiple, cap)


def tile_bytes(tile: tuple[int, int], hidden: int, itemsize: int) -> int:
    """Temporary bytes of one (tokens, columns) tile: logits in float32, p in the products' dtype, the float32 accumulator."""
    return tile[0] * (tile[1] * (4 + itemsize) + 4 * hidden)


def tile_sizes(tokens: int, vocab: int, hidden: torch.Tensor) -> tuple[int, int]:
    """(tokens, columns) of a tile: a function of the shapes alone (so that bits repeat), at most 4096 by 8192; halved along the
    tokens, down to 256, only while a tile takes more than half of the free memory of a CUDA device."""
    token_tile, vocab_tile = _even(tokens, TOKEN_TILE, 128), _even(vocab, VOCAB_TILE, 128)
    if is_real(hidden) and hidden.is_cuda:
        free = free_bytes(hidden.device)
        while token_tile > 256 and tile_bytes((token_tile, vocab_tile), hidden.shape[1], hidden.element_size()) > free // 2:
            token_tile = _even(tokens, token_tile // 2, 128)
    return token_tile, vocab_tile


def is_real(x: torch.Tensor) -> bool:
    """Is this a tensor with data, outside of tracing (its values may be asked for)?"""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def free_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device, with what the caching allocator holds unused."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def spans(n: int, size: int) -> list[tuple[int, int]]:
    return [(a, min(a + size, n)) for a in range(0, n, size)]


# ------------------------------------------------------------------------------------------------------------------ products


def no_autocast(device: torch.device):
    """Context in which matrix products run in the dtypes given, whatever autocast says."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def operand(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (a tile) as operand of a product of `dtype` values with a float32 result; cast to float32 where no product gives that."""
    x = x.to(dtype)
    return x if x.is_cuda else x.to(math_dtype(dtype))


def mm32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32 (float64 of float64)."""
    return torch.mm(a, b) if a.dtype == math_dtype(a.dtype) else torch.mm(a, b, out_dtype=torch.float32)


def addmm32(acc: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """acc += a @ b in float32, in place; a new tensor where acc is None."""
    if acc is None:
        return mm32(a, b)
    if a.dtype == acc.dtype:
        return torch.addmm(acc, a, b, out=acc)
    return torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)


# ------------------------------------------------------------------------------------------------------------------- forward


def project(h, weight, span: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 logits of the columns of `span`, those rows of the weight as an operand); h is an operand already."""
    w = operand(weight[span[0] : span[1]], dtype)
    return mm32(h, w.t()), w


def fold_tokens(hidden, weight, bias, target, head: Head, optional: list[int], jacobian: bool):
    """One token tile over all vocabulary tiles: (state, accumulated U in float32 or None)."""
    dtype = hidden.dtype
    h = operand(hidden, dtype)
    state = acc = None
    for a, b in spans(weight.shape[0], head.tile[1]):
        logits, w = project(h, weight, (a, b), dtype)
        b_tile = None if bias is None else bias[a:b]
        p, r, state = osm.fold(logits, b_tile, target, state, a, *head.z, dtype if jacobian else None, optional)
        del logits
        if jacobian:
            if acc is not None:
                osm.rescale(acc, r)
            acc = addmm32(acc, operand(p, dtype), w)
        del p, w
    return state, acc


def statistics(state: torch.Tensor) -> Stats:
    m, z_t = state[osm.M], state[osm.ZT]
    log_a = state[osm.A].log()
    d = (m - z_t) + log_a  # in this order: m and z_t are large and alike
    top = torch.fmax(m, z_t)  # an ignored row has no z_t
    below = z_t - top
    log_sum = torch.logaddexp((m - top) + log_a, below)
    return Stats(F.logsigmoid(-d), F.logsigmoid(d), torch.sigmoid(d), top, log_sum, below)


def mean_below(state: torch.Tensor, s: Stats) -> torch.Tensor:
    """sum_j p_j (z_j - max z) <= 0. The entropy is log_sum less this: nothing cancels."""
    others = torch.where(s.w == 0, 0.0, s.w * ((state[osm.M] - s.top) + state[osm.PZ] * inverse_sum(state)))
    return others + torch.where(s.w == 1, 0.0, s.log_p.exp() * s.below)


def slope_at(z: torch.Tensor, head: Head) -> torch.Tensor:
    """c = dz/dx, from z."""
    c = head.scale * head.inv_t
    if head.softcap is None:
        return torch.full_like(z, c)
    t = z / (head.softcap * head.inv_t)
    return (1 - t * t) * c


def inverse_sum(state: torch.Tensor) -> torch.Tensor:
    """1 / A, 0 where there is no other column."""
    a = state[osm.A]
    return torch.where(a == 0, 0.0, 1 / a)


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


def sweep(hidden, weight, bias, target, head: Head, outputs: tuple[str, ...], jacobian: bool):
    """All token tiles: ({output: (n,)}, Stats, J / w in hidden's dtype or None). target: -1 where ignored."""
    optional = [_STATE_OF[o] for o in outputs if o in _STATE_OF]
    n = hidden.shape[0]
    parts = spans(n, head.tile[0])
    j = hidden.new_empty(hidden.shape) if jacobian and len(parts) != 1 else None
    states = []
    for a, b in parts:
        state, acc = fold_tokens(hidden[a:b], weight, bias, target[a:b], head, optional, jacobian)
        states.append(state)
        if jacobian:
            c_t = slope_at(state[osm.ZT], head)
            tile = osm.jacobian(acc, weight, target[a:b], c_t, -inverse_sum(state), hidden.dtype)
            del acc
            if j is None:
                j = tile
            else:
                j[a:b] = tile
    empty = hidden.new_empty((osm.STATES, 0), dtype=math_dtype(hidden.dtype))
    state = states[0] if len(states) == 1 else torch.cat(states, 1) if states else empty
    s = statistics(state)
    got = {"log_probs": s.log_p, **_optional_outputs(state, s, weight.shape[0], outputs)}
    return got, s, j


# ------------------------------------------------------------------------------------------------------------------ backward


def gradient_tiles(hidden, weight, bias, target, coef, head: Head, z_term: bool, need: tuple[bool, bool, bool]):
    """(dh, dW, db) where needed, from the gradient of the logits with the row coefficients coef (6, n) of `dlogits`: projects
    again. dW needs all tokens of a vocabulary tile before the next (its float32 accumulator is one tile); without it a token tile
    runs over the vocabulary, and dh's accumulator is one tile."""
    need_h, need_w, need_b = need
    dtype, n, vocab = hidden.dtype, hidden.shape[0], weight.shape[0]
    coef, row_scale, total = _float16_range(coef, dtype)
    dh = torch.empty_like(hidden) if need_h else None
    dw = torch.empty_like(weight) if need_w else None
    db = torch.empty_like(bias) if need_b else None

    def grad_of(h, a, b, c, d):
        logits, w = project(h, weight, (c, d), dtype)
        b_tile = None if bias is None else bias[c:d]
        dx = osm.dlogits(logits, b_tile, target[a:b], coef[:, a:b].contiguous(), c, *head.z, z_term, dtype)
        return operand(dx, dtype), w

    def finish(acc, a, b):
        if row_scale is not None:
            acc.mul_(row_scale[a:b].unsqueeze(1))
        dh[a:b] = acc

    if not need_w and not need_b:
        for a, b in spans(n, head.tile[0]):
            h, acc = operand(hidden[a:b], dtype), None
            for c, d in spans(vocab, head.tile[1]):
                dx, w = grad_of(h, a, b, c, d)
                acc = addmm32(acc, dx, w)
                del dx, w
            finish(acc, a, b)
        return dh, None, None
    accs: list = [None] * len(spans(n, head.tile[0]))
    for c, d in spans(vocab, head.tile[1]):
        w_acc = b_acc = None
        for i, (a, b) in enumerate(spans(n, head.tile[0])):
            dx, w = grad_of(operand(hidden[a:b], dtype), a, b, c, d)
            if need_h:
                accs[i] = addmm32(accs[i], dx, w)
            del w
            if need_w:
                w_acc = addmm32(w_acc, dx.t(), operand(scaled_rows(hidden[a:b], row_scale, total, a, b), dtype))
            if need_b:
                part = bias_part(dx, row_scale, total, a, b)
                b_acc = part if b_acc is None else b_acc + part
            del dx
        if need_w:
            dw[c:d] = 0 if w_acc is None else w_acc if total is None else w_acc * total
        if need_b:
            db[c:d] = 0 if b_acc is None else b_acc if total is None else b_acc * total
    for i, (a, b) in enumerate(spans(n, head.tile[0])):
        if need_h:
            finish(accs[i], a, b)
            accs[i] = None
    return dh, dw, db


def _float16_range(coef: torch.Tensor, dtype: torch.dtype):
    """(coef, row scales, their maximum): float16 keeps neither 1e-8 nor 1e5, so rows of the gradient of the logits are normalised
    there (its size is about |T| + |K| + |P1| + |P2|) and scaled after the product. (coef, None, None) in other dtypes."""
    if dtype != torch.float16 or coef.shape[1] == 0:
        return coef, None, None
    size = coef[2:].abs().sum(0)
    size = torch.where(size == 0, 1.0, size)
    return torch.cat((coef[:2], coef[2:] / size)), size, size.amax()


def scaled_rows(hidden, row_scale, total, a: int, b: int) -> torch.Tensor:
    """h_i scale_i / max scale, in hidden's dtype (h where rows are not scaled)."""
    return hidden if row_scale is None else (hidden * (row_scale[a:b] / total).unsqueeze(1)).to(hidden.dtype)


def bias_part(dx, row_scale, total, a: int, b: int) -> torch.Tensor:
    if row_scale is None:
        return dx.sum(0, dtype=math_dtype(dx.dtype))
    return ((row_scale[a:b] / total).unsqueeze(1) * dx).sum(0)


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


# ------------------------------------------------------------------------------------------------------------------ autograd


def select_rows(target: torch.Tensor, compact: bool) -> torch.Tensor | None:
    """Indices of the rows that are not ignored, or None for all of them."""
    return (target >= 0).nonzero().squeeze(1) if compact else None


def take(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return x if rows is None else x[rows]


def put(x: torch.Tensor, rows: torch.Tensor | None, n: int) -> torch.Tensor:
    """x[i] at rows[i] of n rows of zeros (rows are distinct: the order of writing does not matter)."""
    return x if rows is None else x.new_zeros((n, *x.shape[1:])).index_copy_(0, rows, x)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, head: Head, outputs: tuple[str, ...], jacobian: bool, compact: bool):
        ctx.set_materialize_grads(False)
        rows = select_rows(target, compact)
        h, t = take(hidden, rows), take(target, rows)
        with no_autocast(hidden.device):
            got, s, j = sweep(h, weight, bias, t, head, outputs, jacobian)
        n = hidden.shape[0]
        ignored = t < 0
        results = [put(got[o].masked_fill(ignored, 0), rows, n) if o in got and o in outputs else None for o in OUTPUTS]
        ctx.mark_non_differentiable(*(x for x in results[2:] if x is not None))
        ctx.head, ctx.n = head, n
        ctx.shape = tuple(hidden.shape)
        recompute = not jacobian or "entropy" in outputs
        kept = (hidden, weight, bias, target, got.get("mean_below"), *s) if recompute else ()
        ctx.save_for_backward(j, s.w.masked_fill(ignored, 0), rows, *kept)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, g_entropy, *_):
        j, w, rows, *kept = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        if g is None and g_entropy is None:
            return (None,) * 8
        if g_entropy is None and j is not None:
            f = torch.where(w == 0, 0.0, take(g, rows) * w)
            dh = torch.empty_like(j)
            torch.mul(j, f.unsqueeze(1), out=dh)
            return put(dh, rows, ctx.n), *(None,) * 7
        hidden, weight, bias, target, mu, *s = kept
        h, t = take(hidden, rows), take(target, rows)
        g = None if g is None else take(g, rows).to(w.dtype)
        g_entropy = None if g_entropy is None else take(g_entropy, rows).to(w.dtype)
        coef = row_coefficients(Stats(*s), mu, g, g_entropy)
        coef = torch.where(t < 0, 0.0, coef)
        with no_autocast(hidden.device):
            dh, dw, db = gradient_tiles(h, weight, bias, t, coef, ctx.head, g_entropy is not None, need)
        return None if dh is None else put(dh, rows, ctx.n), dw, db, *(None,) * 5


# -------------------------------------------------------------------------------------------------------------------- public


def check_inputs(name: str, hidden, weight, target, bias) -> None:
    """Raises TypeError and ValueError for dtypes and shapes that `name` does not take."""
    if hidden.dtype not in _FLOATS or weight.dtype not in _FLOATS:
        raise TypeError(f"{name}: want hidden and weight in one of {_FLOATS}, got {hidden.dtype} and {weight.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"{name}: want target in torch.int64, got {target.dtype}")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"{name}: want hidden (..., H) and weight (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"{name}: want target of shape {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: want bias of shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if not hidden.device == weight.device == target.device:
        raise ValueError(f"{name}: want one device, got {hidden.device}, {weight.device}, {target.device}")


def flat_target(name: str, target: torch.Tensor, vocab: int, ignore_index: int) -> torch.Tensor:
    """(n,) targets, -1 where ignored. On a CPU indices are checked; elsewhere that would wait for the device."""
    flat = target.reshape(-1)
    ignored = flat == ignore_index
    if flat.device.type == "cpu" and is_real(flat) and bool((~ignored & ((flat < 0) | (flat >= vocab))).any()):
        raise IndexError(f"{name}: a target is outside of the vocabulary of {vocab}")
    outside = (flat < 0) & ~ignored
    return torch.where(ignored, -1, torch.where(outside, vocab, flat))


def resolve_compact(compact: bool | None, target: torch.Tensor) -> bool:
    return is_real(target) and (target.device.type == "cpu" if compact is None else compact)


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
    """Per-token log-probability of `target` under softmax(softcap tanh(scale (hidden W^T + bias) / softcap) / temperature).

    hidden (..., H), weight (V, H), target (...) int64, bias (V,); bf16, fp16, fp32, fp64. Products run in hidden's dtype (weight
    tiles are cast to it), whatever autocast says; logits and accumulators are float32 (float64 for float64 inputs).
    outputs: what to compute among `log_probs`, `entropy`, `log_sum_sq_probs` = log sum p^2, `mean_logits` = mean of z over the
    vocabulary, `is_top1` = target is the (first) largest; `log_probs` and `entropy` are differentiable by hidden, weight and bias
    (once), the others are not. A column with z = -inf adds nothing to the entropy.
    Rows with target == ignore_index give 0 (is_top1: False) and no gradient. An index outside of the vocabulary raises IndexError
    on a CPU; on a GPU its row is NaN, as asking would wait for the device.
    compact: leave ignored rows out of all products. Their number is needed on the host, which on a GPU waits for the work queued
    before: worth it where many rows are ignored. None: on a CPU only. Never while tracing or under fake tensors.
    tile: (tokens, columns) of a tile; None: from the shapes, see `tile_sizes`.

    Units of 2 tokens H V operations, forward and backward: 1 without gradients; 2 with frozen weight and bias (4 when a gradient
    for the entropy arrives; hidden is saved, too, only where the entropy is asked for); 4 with weight trained.
    Memory beyond inputs, outputs and the saved J (hidden's size and dtype), with tiles (bt, bv) and b bytes an element:
    bt (bv (4 + b) + 4 H) + 60 tokens; at most 0.25 GiB for H = 4096 in bf16. A trained weight adds 4 H (bv + tokens), the float32
    accumulators. Off CUDA the float32 casts of 16-bit operands add 4 (bt bv + bv H + bt H).
    Raises TypeError, ValueError for dtypes and shapes."""
    check_inputs("linear_logprob", hidden, weight, target, bias)
    if not set(outputs) <= set(OUTPUTS):
        raise ValueError(f"linear_logprob: want outputs among {OUTPUTS}, got {tuple(outputs)}")
    outputs = tuple(outputs)
    flat = flat_target("linear_logprob", target, weight.shape[0], ignore_index)
    h = hidden.reshape(-1, hidden.shape[-1])
    head = Head(float(scale), softcap, 1.0 / temperature, tile or tile_sizes(h.shape[0], weight.shape[0], h))
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    jacobian = torch.is_grad_enabled() and hidden.requires_grad and not trained and bool({"log_probs", "entropy"} & set(outputs))
    got = _LinearLogProb.apply(h, weight, bias, flat, head, outputs, jacobian, resolve_compact(compact, flat))
    return LogProbs(*(None if x is None else x.reshape(target.shape) for x in got))
