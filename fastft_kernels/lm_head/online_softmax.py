"""The elementwise work on one tile of logits x = h W^T (n rows, n_cols columns from `start`): four launches around the
matrix products of `linear_logprob` and `linear_cross_entropy`.

    y = scale (x + b),   z = cap tanh(y / cap) / T   (z = y / T without a cap),   c = dz/dx = (scale / T) (1 - tanh^2)

fold      folds the tile into the state of an online softmax over the columns *other than the target t*:
              m = max z_j,  A = sum e_j,  e_j = exp(z_j - m)        (j != t, over all tiles so far)
          and writes p_j = e_j c_j (0 at t) and r = exp(m_old - m), by which what was accumulated with m_old must be
          multiplied. As the maximum is over the others, p keeps its relative precision in 16 bits however close p_t is
          to 1.
rescale   acc_i *= r_i, in place; rows with r_i = 1 (nearly all, after a few tiles) are not touched.
jacobian  alpha_i W[t_i] + beta_i acc_i in the products' dtype: the row Jacobian from the accumulated sum.
dlogits   dx_j = c_j (p_j (P1 + P2 (z_j - max z)) + K), and c_t T at the target: the logits' gradient, where they are
          recomputed.

State: (7, n), rows M, A, ZT, BEFORE, PZ, SQ, SUM below; optional rows are undefined where not asked. Targets outside
[start, start + n_cols) have no column here; a row with a negative target is ignored: no gradient (its state is that of
all columns). Math in float32 (float64 where the logits are)."""

from __future__ import annotations

import math

import torch

from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import on_device, op, use_triton
from fastft_kernels.runtime.language import tl, triton
from fastft_kernels.runtime.precise import exp, exp_normal, quotient, tanh_and_slope

# Rows of the state: maximum, sum of exponentials, target's z (NaN until met), maximum before it; sums of e (z - m),
# e^2, z.
M, A, ZT, BEFORE, PZ, SQ, SUM = range(7)
STATES = 7


# references


def transform_ref(x, bias, scale: float, softcap: float | None, inv_t: float):
    """(z, c): transformed logits and their derivative by x (a float without a soft-cap)."""
    y = (x if bias is None else x + bias.to(x.dtype)) * scale
    if softcap is None:
        return y * inv_t, scale * inv_t
    t = torch.tanh(y / softcap)
    return t * (softcap * inv_t), (1 - t * t) * (scale * inv_t)


def fold_ref(logits, bias, target, state, start, scale, softcap, inv_t, dtype, optional):
    """(p, r, state); p is None where dtype is None. optional: which of (BEFORE, PZ, SQ, SUM) are asked."""
    z, c = transform_ref(logits, bias, scale, softcap, inv_t)
    n, n_cols = z.shape
    if state is None:
        state = z.new_zeros(STATES, n)
        state[M], state[BEFORE], state[ZT] = -math.inf, -math.inf, math.nan
    new = state.clone()
    col = torch.arange(n_cols, device=z.device)
    local = (target - start).unsqueeze(1)  # [n, 1]
    others = z.masked_fill(col == local, -math.inf)
    m = torch.maximum(state[M], others.amax(1))
    ref = torch.where(m == -math.inf, 0.0, m)  # -inf - -inf
    r = torch.exp(state[M] - ref)
    e = torch.exp(others - ref.unsqueeze(1))
    new[M] = m
    new[A] = state[A] * r + e.sum(1)
    inside = (local >= 0) & (local < n_cols)
    new[ZT] = torch.where(inside, z.gather(1, local.clamp(0, n_cols - 1)), state[ZT].unsqueeze(1)).squeeze(1)
    if BEFORE in optional:
        new[BEFORE] = torch.maximum(state[BEFORE], z.masked_fill(col >= local, -math.inf).amax(1))
    if PZ in optional:
        shift = torch.where(r == 0, 0.0, state[M] - ref)  # the old sum was about the old maximum
        new[PZ] = r * (state[PZ] + shift * state[A]) + (e * torch.where(e == 0, 0.0, others - ref.unsqueeze(1))).sum(1)
    if SQ in optional:
        new[SQ] = state[SQ] * r * r + (e * e).sum(1)
    if SUM in optional:
        new[SUM] = state[SUM] + z.sum(1)
    return None if dtype is None else (e * c).to(dtype), r, new


def dlogits_ref(logits, bias, target, coef, start, scale, softcap, inv_t, dtype):
    """dx in dtype. coef: (6, n) rows: maximum z, log-sum-exp minus it, P1, P2, K, T."""
    z, c = transform_ref(logits, bias, scale, softcap, inv_t)
    top, log_sum, p1, p2, k, at_target = coef.unsqueeze(2)
    z = z - top
    p = torch.exp(z - log_sum)
    dz = p * (p1 + p2 * torch.where(p == 0, 0.0, z)) + k
    col = torch.arange(z.shape[1], device=z.device)
    dz = torch.where(col == (target - start).unsqueeze(1), at_target, dz)
    return torch.where(target.unsqueeze(1) < 0, 0.0, dz * c).to(dtype)


def jacobian_ref(acc, weight, target, alpha, beta, dtype):
    """alpha_i W[t_i] + beta_i acc_i; zero where t_i is not a row of W."""
    known = (target >= 0) & (target < weight.shape[0])
    rows = weight[torch.where(known, target, 0)].to(acc.dtype)
    out = alpha.unsqueeze(1) * rows + beta.unsqueeze(1) * acc
    return torch.where(known.unsqueeze(1), out, 0.0).to(dtype)


# kernels


@triton.jit
def _transform(x, scale, softcap, inv_t, HAS_CAP: tl.constexpr):
    """z, c."""
    y = x * scale
    if HAS_CAP:
        u = quotient(y, softcap, tl.div_rn(1.0, softcap))
        t, slope = tanh_and_slope(u)
        z = t * (softcap * inv_t)
        c = slope * (scale * inv_t)
    else:
        z = y * inv_t
        c = tl.zeros_like(y) + scale * inv_t  # not y * 0: y may be infinite
    return z, c


@triton.jit
def _fold_kernel(
    logits_ptr,
    bias_ptr,
    target_ptr,
    state_ptr,
    p_ptr,
    r_ptr,
    new_ptr,
    n_rows,
    n_cols,
    start,
    scale,
    softcap,
    inv_t,
    FIRST: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WRITE_P: tl.constexpr,
    BEFORE: tl.constexpr,
    PZ: tl.constexpr,
    SQ: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program folds one row of the tile."""
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    mask = col < n_cols
    at = row.to(tl.int64) * n_cols + col
    x = tl.load(logits_ptr + at, mask=mask, other=0.0)  # [BLOCK]
    if bias_ptr is not None:
        x += tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)
    z, c = _transform(x, scale, softcap, inv_t, HAS_CAP)
    local = tl.load(target_ptr + row) - start
    minus_inf = float("-inf")
    others = tl.where(mask & (col != local), z, minus_inf)
    if FIRST:
        m_old = minus_inf
        a_old = 0.0
    else:
        m_old = tl.load(state_ptr + row)
        a_old = tl.load(state_ptr + n_rows + row)
    m = tl.maximum(tl.max(others, 0), m_old)
    ref = tl.where(m == minus_inf, 0.0, m)
    r = exp(m_old - ref)
    if HAS_CAP:  # which takes many registers
        e = exp_normal(others - ref)
    else:
        e = exp(others - ref)
    tl.store(new_ptr + row, m)
    tl.store(new_ptr + n_rows + row, a_old * r + tl.sum(e, 0))
    tl.store(r_ptr + row, r)
    if WRITE_P:
        tl.store(p_ptr + at, (e * c).to(p_ptr.dtype.element_ty), mask=mask)
    z_t = tl.sum(tl.where(col == local, z, 0.0), 0)
    if FIRST:
        z_t = tl.where((local >= 0) & (local < n_cols), z_t, float("nan"))
    else:
        z_t = tl.where((local >= 0) & (local < n_cols), z_t, tl.load(state_ptr + 2 * n_rows + row))
    tl.store(new_ptr + 2 * n_rows + row, z_t)
    if BEFORE:
        before = tl.max(tl.where(mask & (col < local), z, minus_inf), 0)
        if not FIRST:
            before = tl.maximum(before, tl.load(state_ptr + 3 * n_rows + row))
        tl.store(new_ptr + 3 * n_rows + row, before)
    if PZ:
        pz = tl.sum(e * tl.where(e == 0, 0.0, others - ref), 0)
        if not FIRST:
            pz += r * (tl.load(state_ptr + 4 * n_rows + row) + tl.where(r == 0, 0.0, m_old - ref) * a_old)
        tl.store(new_ptr + 4 * n_rows + row, pz)
    if SQ:
        sq = tl.sum(e * e, 0)
        if not FIRST:
            sq += r * r * tl.load(state_ptr + 5 * n_rows + row)
        tl.store(new_ptr + 5 * n_rows + row, sq)
    if SUM:
        total = tl.sum(tl.where(mask, z, 0.0), 0)
        if not FIRST:
            total += tl.load(state_ptr + 6 * n_rows + row)
        tl.store(new_ptr + 6 * n_rows + row, total)


@triton.jit
def _dlogits_kernel(
    logits_ptr,
    bias_ptr,
    target_ptr,
    coef_ptr,
    dx_ptr,
    n_rows,
    n_cols,
    start,
    scale,
    softcap,
    inv_t,
    HAS_CAP: tl.constexpr,
    Z_TERM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row of the gradient of the logits."""
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    mask = col < n_cols
    at = row.to(tl.int64) * n_cols + col
    x = tl.load(logits_ptr + at, mask=mask, other=0.0)  # [BLOCK]
    if bias_ptr is not None:
        x += tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)
    z, c = _transform(x, scale, softcap, inv_t, HAS_CAP)
    target = tl.load(target_ptr + row)
    z -= tl.load(coef_ptr + row)
    p = exp(z - tl.load(coef_ptr + n_rows + row))
    factor = tl.load(coef_ptr + 2 * n_rows + row)
    if Z_TERM:
        factor += tl.load(coef_ptr + 3 * n_rows + row) * tl.where(p == 0, 0.0, z)
    dz = p * factor + tl.load(coef_ptr + 4 * n_rows + row)
    dz = tl.where(col == target - start, tl.load(coef_ptr + 5 * n_rows + row), dz)
    dx = tl.where(target < 0, 0.0, dz * c)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rescale_kernel(acc_ptr, r_ptr, n_cols, BLOCK: tl.constexpr):
    """One program: one block of one row, only where the running maximum has moved."""
    row = tl.program_id(0)
    r = tl.load(r_ptr + row)
    if r != 1.0:
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = col < n_cols
        at = acc_ptr + row.to(tl.int64) * n_cols + col
        tl.store(at, tl.load(at, mask=mask) * r, mask=mask)


@triton.jit
def _jacobian_kernel(
    acc_ptr, weight_ptr, target_ptr, alpha_ptr, beta_ptr, out_ptr, w_row, w_col, n_cols, vocab, BLOCK: tl.constexpr
):
    """One program: one block of one row."""
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < n_cols
    at = row.to(tl.int64) * n_cols + col
    target = tl.load(target_ptr + row)
    known = col < tl.where((target >= 0) & (target < vocab), n_cols, 0)
    w = tl.load(weight_ptr + target.to(tl.int64) * w_row + col.to(tl.int64) * w_col, mask=known, other=0.0).to(
        tl.float32
    )
    out = tl.load(alpha_ptr + row) * w + tl.load(beta_ptr + row) * tl.load(acc_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, tl.where(known, out, 0.0).to(out_ptr.dtype.element_ty), mask=mask)


# launchers


def _row_block(n_cols: int) -> tuple[int, int]:
    """(BLOCK, num_warps) of a program that holds a whole row of a tile: 16 columns a thread."""
    block = triton.next_power_of_2(n_cols)
    return block, min(max(block // 512, 1), 16)


def _fold_fake(logits, bias, target, state, start, scale, softcap, inv_t, dtype, optional):
    n, n_cols = logits.shape
    p = logits.new_empty((n, n_cols) if dtype is not None else (0,), dtype=dtype or logits.dtype)
    return p, logits.new_empty(n), logits.new_empty(STATES, n)


@op(
    "online_softmax_fold(Tensor logits, Tensor? bias, Tensor target, Tensor? state, int start, float scale, float? "
    "softcap, "
    "float inv_t, ScalarType? dtype, int[] optional) -> (Tensor, Tensor, Tensor)",
    _fold_fake,
)
def fold(logits, bias, target, state, start, scale, softcap, inv_t, dtype, optional):
    """(p, r, state): p (n, n_cols) in dtype (empty where dtype is None), r (n,), the new state (7, n)."""
    if not use_triton(logits, *_given(dtype, None if bias is None else bias.dtype)):
        p, r, new = fold_ref(logits, bias, target, state, start, scale, softcap, inv_t, dtype, optional)
        return logits.new_empty(0) if p is None else p, r, new
    p, r, new = _fold_fake(logits, bias, target, state, start, scale, softcap, inv_t, dtype, optional)
    n, n_cols = logits.shape
    block, warps = _row_block(n_cols)
    logits, target = (
        logits.contiguous(),
        target.contiguous(),
    )  # both are, but for a caller of the operator; bias may be a slice
    bias = None if bias is None else bias.contiguous()
    state = None if state is None else state.contiguous()
    with on_device(logits):
        _fold_kernel[(n,)](
            logits,
            bias,
            target,
            state,
            p,
            r,
            new,
            n,
            n_cols,
            start,
            scale,
            1.0 if softcap is None else softcap,
            inv_t,
            FIRST=state is None,
            HAS_CAP=softcap is not None,
            WRITE_P=dtype is not None,
            BEFORE=BEFORE in optional,
            PZ=PZ in optional,
            SQ=SQ in optional,
            SUM=SUM in optional,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return p, r, new


def _given(*dtypes: torch.dtype | None) -> list[torch.dtype]:
    return [d for d in dtypes if d is not None]


def _dlogits_fake(logits, bias, target, coef, start, scale, softcap, inv_t, z_term, dtype):
    return torch.empty_like(logits, dtype=dtype)


@op(
    "online_softmax_dlogits(Tensor logits, Tensor? bias, Tensor target, Tensor coef, int start, float scale, float? "
    "softcap, "
    "float inv_t, bool z_term, ScalarType dtype) -> Tensor",
    _dlogits_fake,
)
def dlogits(logits, bias, target, coef, start, scale, softcap, inv_t, z_term, dtype):
    """dx (n, n_cols) in dtype. z_term: False says that P2 is zero everywhere."""
    if not use_triton(logits, *_given(dtype, None if bias is None else bias.dtype)):
        return dlogits_ref(logits, bias, target, coef, start, scale, softcap, inv_t, dtype)
    logits, target, coef = logits.contiguous(), target.contiguous(), coef.contiguous()
    bias = None if bias is None else bias.contiguous()
    dx = torch.empty_like(logits, dtype=dtype)
    n, n_cols = logits.shape
    block, warps = _row_block(n_cols)
    with on_device(logits):
        _dlogits_kernel[(n,)](
            logits,
            bias,
            target,
            coef,
            dx,
            n,
            n_cols,
            start,
            scale,
            1.0 if softcap is None else softcap,
            inv_t,
            HAS_CAP=softcap is not None,
            Z_TERM=z_term,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return dx


def _rescale_fake(acc, r):
    return None


@op("online_softmax_rescale(Tensor(a!) acc, Tensor r) -> ()", _rescale_fake)
def rescale(acc, r):
    """acc (n, H) *= r (n,), in place."""
    if not use_triton(acc) or not acc.is_contiguous():
        acc.mul_(r.unsqueeze(1))
        return
    r = r.contiguous()
    n, n_cols = acc.shape
    with on_device(acc):
        block = min(4096, triton.next_power_of_2(n_cols))
        _rescale_kernel[(n, triton.cdiv(n_cols, block))](
            acc, r, n_cols, BLOCK=block, num_warps=8, enable_fp_fusion=True
        )


def _jacobian_fake(acc, weight, target, alpha, beta, dtype):
    return torch.empty_like(acc, dtype=dtype)


@op(
    "online_softmax_jacobian(Tensor acc, Tensor weight, Tensor target, Tensor alpha, Tensor beta, ScalarType dtype) -> "
    "Tensor",
    _jacobian_fake,
)
def jacobian(acc, weight, target, alpha, beta, dtype):
    """alpha_i W[t_i] + beta_i acc_i, (n, H) in dtype."""
    if not use_triton(acc, weight.dtype, dtype):
        return jacobian_ref(acc, weight, target, alpha, beta, dtype)
    acc, target, alpha, beta = acc.contiguous(), target.contiguous(), alpha.contiguous(), beta.contiguous()
    out = torch.empty_like(acc, dtype=dtype)
    n, n_cols = acc.shape
    block = min(2048, triton.next_power_of_2(n_cols))
    with on_device(acc):
        _jacobian_kernel[(n, triton.cdiv(n_cols, block))](
            acc,
            weight,
            target,
            alpha,
            beta,
            out,
            *weight.stride(),
            n_cols,
            weight.shape[0],
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


# ahead-of-time cases


def _tile_case(kernel, p: str, pointers: dict, flags: dict, note: str) -> AotCase:
    numbers = {"n_rows": "i32", "n_cols": "i32", "start": "i32", "scale": "fp32", "softcap": "fp32", "inv_t": "fp32"}
    signature = {"logits_ptr": "*fp32", "target_ptr": "*i64", **pointers, **numbers}
    absent = {} if "bias_ptr" in pointers else {"bias_ptr": None}
    block, warps = _row_block(8064)
    return AotCase(kernel, signature, {**flags, **absent, "BLOCK": block}, num_warps=warps, note=f"{note}, {p}")


def _cases() -> tuple[AotCase, ...]:
    fold_of = lambda p: {"state_ptr": "*fp32", "p_ptr": f"*{p}", "r_ptr": "*fp32", "new_ptr": "*fp32"}
    none = dict.fromkeys(("BEFORE", "PZ", "SQ", "SUM"), False)
    every = dict.fromkeys(none, True)
    entropy = {"HAS_CAP": True, "Z_TERM": True}
    cases = []
    for p in ("bf16", "fp16"):
        plain = {"FIRST": False, "HAS_CAP": False, "WRITE_P": True, **none}
        capped = {"FIRST": True, "HAS_CAP": True, "WRITE_P": True, **every}
        cases += [
            _tile_case(_fold_kernel, p, fold_of(p), plain, "Qwen3-8B, 8064 columns"),
            _tile_case(_fold_kernel, p, {**fold_of(p), "bias_ptr": f"*{p}"}, capped, "Gemma-2, every output, bias"),
            _tile_case(_dlogits_kernel, p, {"coef_ptr": "*fp32", "dx_ptr": f"*{p}"}, entropy, "Gemma-2, entropy"),
            AotCase(
                _jacobian_kernel,
                {
                    "acc_ptr": "*fp32",
                    "weight_ptr": f"*{p}",
                    "target_ptr": "*i64",
                    "alpha_ptr": "*fp32",
                    "beta_ptr": "*fp32",
                    "out_ptr": f"*{p}",
                    "w_row": "i32",
                    "n_cols": "i32",
                    "vocab": "i32",
                },
                {"w_col": 1, "BLOCK": 2048},
                num_warps=4,
                note=f"hidden 4096, {p}",
            ),
        ]
    rescale_types = {"acc_ptr": "*fp32", "r_ptr": "*fp32", "n_cols": "i32"}
    cases.append(AotCase(_rescale_kernel, rescale_types, {"BLOCK": 4096}, num_warps=8, note="hidden 4096"))
    return tuple(cases)


AOT_CASES = _cases()
