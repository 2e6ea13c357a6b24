"""The LM head in tiles: the matrix products and loops around the launches of `online_softmax`, for `linear_logprob` and
`linear_cross_entropy`. A tile is (tokens, columns); what is as large as (tokens, vocabulary) never exists.

Forward (`sweep`): a token tile runs over the vocabulary tiles; logits in float32 from operands in hidden's dtype,
folded into the online softmax, and p W_tile accumulated in float32 where a row Jacobian is wanted: one or two products
(2 tokens H V operations). Backward (`gradient_tiles`), where the Jacobian does not serve: logits again, dz, then dz W
and dz^T h: two or three products.

Float32 results of 16-bit operands come from torch.mm and torch.addmm with out_dtype on CUDA; elsewhere a tile's
operands are cast to float32. p and dz are rounded to hidden's dtype on both, so both give the same precision. Nothing
is added atomically."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastft_kernels.lm_head import online_softmax as osm
from fastft_kernels.runtime.dispatch import goes_to_cuda, math_dtype, op

TOKEN_TILE, VOCAB_TILE = 4096, 8192
TILE_BYTES = 1 << 28  # 4096 x 8192 at H = 4096 in 16 bits
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class HeadTensors(NamedTuple):
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


# tiles


def even_tile(n: int, cap: int, multiple: int) -> int:
    """Size of the fewest equal tiles of at most `cap` that cover n, rounded up to `multiple`."""
    if n <= cap:
        return max(n, 1)
    size = -(-n // -(-n // cap))
    return min(-(-size // multiple) * multiple, cap)


def tile_bytes(tile: tuple[int, int], hidden: int, itemsize: int) -> int:
    """Temporary bytes of one (tokens, columns) tile: logits in float32, p in the products' dtype, the float32
    accumulator."""
    return tile[0] * (tile[1] * (4 + itemsize) + 4 * hidden)


def tile_sizes(tokens: int, vocab: int, hidden: torch.Tensor) -> tuple[int, int]:
    """(tokens, columns) of a tile: a function of shapes and dtype alone (never of the free memory, so that bits
    repeat), at most 4096 by 8192; halved along the tokens, down to 256, while a tile takes more than TILE_BYTES."""
    token_tile, vocab_tile = even_tile(tokens, TOKEN_TILE, 128), even_tile(vocab, VOCAB_TILE, 128)
    while (
        token_tile > 256 and tile_bytes((token_tile, vocab_tile), hidden.shape[1], hidden.element_size()) > TILE_BYTES
    ):
        token_tile = even_tile(tokens, token_tile // 2, 128)
    return token_tile, vocab_tile


def is_real(x: torch.Tensor) -> bool:
    """Is this a tensor with data, outside of tracing (its values may be asked for)?"""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def spans(n: int, size: int) -> list[tuple[int, int]]:
    """(start, end) of tiles of at most `size` that cover n."""
    return [(a, min(a + size, n)) for a in range(0, n, size)]


# products


def no_autocast(device: torch.device):
    """Context in which matrix products run in the dtypes given, whatever autocast says."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def operand(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (a tile) as operand of a product of `dtype` values with a float32 result; cast to float32 where no product
    gives that."""
    x = x.to(dtype)
    return x if goes_to_cuda(x) else x.to(math_dtype(dtype))


def mm32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32 (float64 of float64)."""
    return torch.mm(a, b) if a.dtype == math_dtype(a.dtype) else torch.mm(a, b, out_dtype=torch.float32)


def addmm32(acc: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """acc += a @ b in float32, in place; a new tensor where acc is None."""
    if acc is None:
        return mm32(a, b)
    if a.dtype == acc.dtype:
        return torch.addmm(acc, a, b, out=acc)
    if is_real(acc):
        return torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)
    _add_product(acc, a, b)
    return acc


@op("add_product(Tensor(a!) acc, Tensor a, Tensor b) -> ()", lambda acc, a, b: None)
def _add_product(acc, a, b):
    """acc += a b, for fake tensors and tracers, where torch 2.11 takes addmm's out_dtype for its beta. (Real tensors go
    to torch's own operator, so that whoever counts products sees them.)"""
    torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)


# forward


def project(h, weight, span: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 logits of the columns of `span`, those rows of the weight as an operand); h is an operand already."""
    w = operand(weight[span[0] : span[1]], dtype)
    return mm32(h, w.t()), w


def fold_tokens(hidden, weight, bias, target, head: HeadTensors, optional: list[int], jacobian: bool):
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
    """Statistics of the target's probability from the online softmax's final state."""
    m, z_t = state[osm.M], state[osm.ZT]
    log_a = state[osm.A].log()
    d = (m - z_t) + log_a  # in this order: m and z_t are large and alike
    top = torch.fmax(m, z_t)  # an ignored row has no z_t
    below = z_t - top
    log_sum = torch.logaddexp((m - top) + log_a, below)
    return Stats(F.logsigmoid(-d), F.logsigmoid(d), torch.sigmoid(d), top, log_sum, below)


def slope_at(z: torch.Tensor, head: HeadTensors) -> torch.Tensor:
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


def sweep(
    hidden,
    weight,
    bias,
    target,
    head: HeadTensors,
    optional: list[int],
    jacobian: bool,
    factors: Callable | None = None,
):
    """All token tiles: (state (7, n), J or None). target: -1 where ignored.
    J = a c_t W_t + b U / A in hidden's dtype, (a, b) = factors(Stats) by row; without: (1, -1), dlog p_t/dh over w."""
    n = hidden.shape[0]
    parts = spans(n, head.tile[0])
    j = hidden.new_empty(hidden.shape) if jacobian and len(parts) != 1 else None
    states = []
    for a, b in parts:
        state, acc = fold_tokens(hidden[a:b], weight, bias, target[a:b], head, optional, jacobian)
        states.append(state)
        if jacobian:
            alpha, beta = slope_at(state[osm.ZT], head), inverse_sum(state)
            if factors is None:
                beta = -beta
            else:
                at_target, others = factors(statistics(state))
                alpha, beta = alpha * at_target, beta * others
            tile = osm.jacobian(acc, weight, target[a:b], alpha, beta, hidden.dtype)
            del acc
            if j is None:
                j = tile
            else:
                j[a:b] = tile
    if not states:
        return hidden.new_empty((osm.STATES, 0), dtype=math_dtype(hidden.dtype)), j
    return states[0] if len(states) == 1 else torch.cat(states, 1), j


# backward


def gradient_tiles(
    hidden, weight, bias, target, coef, w, head: HeadTensors, z_term: bool, need: tuple[bool, bool, bool]
):
    """(dh, dW, db) where needed, from the gradient of the logits with the row coefficients coef (6, n) of `dlogits`:
    projects again. dW needs all tokens of a vocabulary tile before the next (its float32 accumulator is one tile);
    without it a token tile runs over the vocabulary, and dh's accumulator is one tile."""
    need_h, need_w, need_b = need
    dtype, n, vocab = hidden.dtype, hidden.shape[0], weight.shape[0]
    coef, row_scale, total = float16_range(coef, w, dtype)
    dh = torch.empty_like(hidden) if need_h else None
    dw = torch.empty_like(weight) if need_w else None
    db = torch.empty_like(bias) if need_b else None

    def grad_of(h, a, b, c, d):
        logits, w_tile = project(h, weight, (c, d), dtype)
        b_tile = None if bias is None else bias[c:d]
        dx = osm.dlogits(logits, b_tile, target[a:b], coef[:, a:b].contiguous(), c, *head.z, z_term, dtype)
        return operand(dx, dtype), w_tile

    def finish(acc, a, b):
        if row_scale is not None:
            acc.mul_(row_scale[a:b].unsqueeze(1))
        dh[a:b] = acc

    if not need_w and not need_b:
        for a, b in spans(n, head.tile[0]):
            h, acc = operand(hidden[a:b], dtype), None
            for c, d in spans(vocab, head.tile[1]):
                dx, w_tile = grad_of(h, a, b, c, d)
                acc = addmm32(acc, dx, w_tile)
                del dx, w_tile
            finish(acc, a, b)
        return dh, None, None
    accs: list = [None] * len(spans(n, head.tile[0]))
    for c, d in spans(vocab, head.tile[1]):
        w_acc = b_acc = None
        for i, (a, b) in enumerate(spans(n, head.tile[0])):
            dx, w_tile = grad_of(operand(hidden[a:b], dtype), a, b, c, d)
            if need_h:
                accs[i] = addmm32(accs[i], dx, w_tile)
            del w_tile
            if need_w:
                w_acc = addmm32(
                    w_acc, dx.t(), operand(scaled_rows(hidden[a:b], part_of(row_scale, a, b), total), dtype)
                )
            if need_b:
                part = bias_part(dx, part_of(row_scale, a, b), total)
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


def part_of(x: torch.Tensor | None, a: int, b: int) -> torch.Tensor | None:
    """x[a:b], or None."""
    return None if x is None else x[a:b]


def float16_range(coef: torch.Tensor, w: torch.Tensor, dtype: torch.dtype):
    """(coef, row scales, their maximum): float16 keeps neither 1e-8 nor 1e5, so there a row of the logits' gradient is
    divided by its size, |T| + |K| + w (|P1| + |P2|), and multiplied after the product. (coef, None, None) in other
    dtypes."""
    if dtype != torch.float16 or coef.shape[1] == 0:
        return coef, None, None
    _, _, p1, p2, k, at_target = coef.abs()
    size = at_target + k + w * (p1 + p2)
    size = torch.where(size == 0, 1.0, size)
    return torch.cat((coef[:2], coef[2:] / size)), size, size.amax()


def scaled_rows(hidden, row_scale, total) -> torch.Tensor:
    """h_i scale_i / max scale, in hidden's dtype (h where rows are not scaled)."""
    return hidden if row_scale is None else (hidden * (row_scale / total).unsqueeze(1)).to(hidden.dtype)


def bias_part(dx, row_scale, total) -> torch.Tensor:
    """sum_i dx_i scale_i / max scale, in float32."""
    return (
        dx.sum(0, dtype=math_dtype(dx.dtype)) if row_scale is None else ((row_scale / total).unsqueeze(1) * dx).sum(0)
    )


# rows and checks


def select_rows(target: torch.Tensor, compact: bool) -> torch.Tensor | None:
    """Indices of the rows that are not ignored, or None for all of them."""
    return (target >= 0).nonzero().squeeze(1) if compact else None


def take(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The rows named, or all."""
    return x if rows is None else x[rows]


def put(x: torch.Tensor, rows: torch.Tensor | None, n: int) -> torch.Tensor:
    """x[i] at rows[i] of n rows of zeros (rows are distinct: the order of writing does not matter)."""
    return x if rows is None else x.new_zeros((n, *x.shape[1:])).index_copy_(0, rows, x)


def check_inputs(name: str, hidden, weight, target, bias) -> None:
    """Raises TypeError and ValueError for dtypes and shapes that `name` does not take."""
    if hidden.dtype not in _FLOATS or weight.dtype not in _FLOATS:
        raise TypeError(f"{name}: want hidden and weight in one of {_FLOATS}, got {hidden.dtype} and {weight.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"{name}: want target in torch.int64, got {target.dtype}")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{name}: want hidden (..., H) and weight (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"{name}: want target of shape {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: want bias of shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if not hidden.device == weight.device == target.device:
        raise ValueError(f"{name}: want one device, got {hidden.device}, {weight.device}, {target.device}")


def check_tile(name: str, tile: tuple[int, int] | None) -> None:
    """Raises ValueError for a tile that is not (tokens, vocabulary entries) of at least one each."""
    if tile is not None and not (tile[0] >= 1 and 1 <= tile[1] <= VOCAB_TILE):
        raise ValueError(f"{name}: want a tile of (1 or more tokens, 1 to {VOCAB_TILE} columns), got {tile}")


def flat_target(name: str, target: torch.Tensor, vocab: int, ignore_index: int) -> torch.Tensor:
    """(n,) targets, -1 where ignored. On a CPU indices are checked; elsewhere that would wait for the device."""
    flat = target.reshape(-1)
    ignored = flat == ignore_index
    if flat.device.type == "cpu" and is_real(flat) and bool((~ignored & ((flat < 0) | (flat >= vocab))).any()):
        raise IndexError(f"{name}: a target is outside of the vocabulary of {vocab}")
    outside = (flat < 0) & ~ignored
    return torch.where(ignored, -1, torch.where(outside, vocab, flat))


def resolve_compact(compact: bool | None, target: torch.Tensor) -> bool:
    """Whether ignored rows are left out: as asked, or where there are some."""
    return is_real(target) and (target.device.type == "cpu" if compact is None else compact)
