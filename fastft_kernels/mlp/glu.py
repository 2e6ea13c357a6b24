"""h = act(g) (u + o),  with g = min(gate, L) and u = clamp(up, -L, L) where a limit L is given.

    dgate = dh (u + o) act'(g) [gate <= L]        dup = dh act(g) [-L <= up <= L]

act, act': recomputed from gate, never saved (formulas in `activation`). o = up_offset. The gradient is zero where a
value was clamped and passes where it equals the limit, as torch.clamp's. GPT-OSS: activation="swiglu_oai", limit=7,
up_offset=1; DeepSeek-V4: "silu" with a limit.

gate, up: (..., N), bf16, fp16, fp32 in and out, math in fp32, one rounding (eager rounds act(gate) as well); float64
takes the reference, exactly. gate and up are often halves of one fused product, chunks (row stride 2N) or interleaved
([..., ::2], [..., 1::2]): both are read in place, by row and column stride."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastft_kernels.mlp.activation import (
    LAUNCH,
    act_grad,
    act_grad_ref,
    act_ref,
    act_value,
    act_weight,
    resolve,
    tile_of,
    tiled,
)
from fastft_kernels.runtime import higher_order
from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import (
    applied,
    math_dtype,
    on_device,
    op,
    quick_apply,
    use_triton,
    wider,
)
from fastft_kernels.runtime.language import tl, triton


class GluSettings(NamedTuple):
    """act, alpha: as `activation.resolve` gives them; limit: None is no clamp."""

    act: str
    alpha: float
    limit: float | None
    offset: float


# reference


def _clamped(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))


def glu_ref(
    gate: torch.Tensor, up: torch.Tensor, act: str, alpha: float, limit: float | None, offset: float
) -> torch.Tensor:
    """h in the dtype of gate and up."""
    g, u = _clamped(gate, up, limit)
    return act_ref(g, act, alpha) * (u + offset if offset else u)


def glu_plain(
    gate: torch.Tensor, up: torch.Tensor, act: str, alpha: float, limit: float | None, offset: float
) -> torch.Tensor:
    """`glu` in plain torch, in its dtypes; differentiable any number of times."""
    dtype = wider(gate.dtype, up.dtype)
    f = math_dtype(dtype)
    return glu_ref(gate.to(f), up.to(f), act, alpha, limit, offset).to(dtype)


def glu_bwd_ref(
    dh, gate, up, act: str, alpha: float, limit: float | None, offset: float, want_gate: bool, want_up: bool
):
    """(dgate or None, dup or None) in the dtype of gate and up."""
    g, u = _clamped(gate, up, limit)
    dgate = dh * (u + offset if offset else u) * act_grad_ref(g, act, alpha) if want_gate else None
    dup = dh * act_ref(g, act, alpha) if want_up else None
    if limit is not None:
        dgate = dgate * (gate <= limit) if want_gate else None
        dup = dup * (up.abs() <= limit) if want_up else None
    return dgate, dup


# kernels


@triton.jit
def value(g, u, alpha, limit, offset, ACT: tl.constexpr, CLAMP: tl.constexpr):
    """h of gate and up, in float32."""
    if CLAMP:  # comparisons that let NaN through
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    return act_value(g, act_weight(g, alpha, ACT), ACT) * (u + offset)


@triton.jit
def _glu_fwd_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    rows,
    cols,
    gate_row,
    gate_col,
    up_row,
    up_col,
    alpha,
    limit,
    offset,
    ACT: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    r, c, mask = tile_of(rows, cols, BLOCK_M, BLOCK_N)
    g = tl.load(gate_ptr + r * gate_row + c * gate_col, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    u = tl.load(up_ptr + r * up_row + c * up_col, mask=mask, other=0.0).to(tl.float32)
    h = value(g, u, alpha, limit, offset, ACT, CLAMP)
    tl.store(h_ptr + r * cols + c, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_bwd_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,  # this and the next two: None where not wanted
    dup_ptr,
    h_ptr,
    rows,
    cols,
    dh_row,
    dh_col,
    gate_row,
    gate_col,
    up_row,
    up_col,
    alpha,
    limit,
    offset,
    ACT: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    r, c, mask = tile_of(rows, cols, BLOCK_M, BLOCK_N)
    g = tl.load(gate_ptr + r * gate_row + c * gate_col, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    u = tl.load(up_ptr + r * up_row + c * up_col, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + r * dh_row + c * dh_col, mask=mask, other=0.0).to(tl.float32)
    if CLAMP:
        gate_passes = g <= limit
        up_passes = tl.abs(u) <= limit
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    w = act_weight(g, alpha, ACT)
    a = act_value(g, w, ACT)
    to = r * cols + c
    if h_ptr is not None:
        tl.store(h_ptr + to, (a * (u + offset)).to(h_ptr.dtype.element_ty), mask=mask)
    if dup_ptr is not None:
        dup = dh * a
        if CLAMP:
            dup = tl.where(up_passes, dup, 0.0)
        tl.store(dup_ptr + to, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    if dgate_ptr is not None:
        dgate = dh * (u + offset) * act_grad(g, w, alpha, ACT)
        if CLAMP:
            dgate = tl.where(gate_passes, dgate, 0.0)
        tl.store(dgate_ptr + to, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)


# launchers


def _h(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape, dtype=wider(gate.dtype, up.dtype))


def _like(x: torch.Tensor, want: bool = True) -> torch.Tensor:
    return x.new_empty(x.shape if want else (0,))


@op(
    "glu_fwd(Tensor gate, Tensor up, str act, float alpha, float? limit, float offset) -> Tensor",
    lambda gate, up, *form: _h(gate, up),
)
def _fwd(gate, up, act, alpha, limit, offset):
    if not use_triton(gate, up.dtype):
        dtype = wider(gate.dtype, up.dtype)
        f = math_dtype(dtype)
        if gate.dtype == up.dtype == f:
            return glu_ref(gate, up, act, alpha, limit, offset).contiguous()
        return glu_ref(gate.to(f), up.to(f), act, alpha, limit, offset).to(dtype).contiguous()
    h = _h(gate, up)
    if h.numel():
        t, (gate, up) = tiled(gate, up)
        with on_device(h):
            _glu_fwd_kernel[t.grid](
                gate,
                up,
                h,
                t.rows,
                t.cols,
                *t.strides[0],
                *t.strides[1],
                alpha,
                limit or 0.0,
                offset,
                ACT=act,
                CLAMP=limit is not None,
                BLOCK_M=t.block_m,
                BLOCK_N=t.block_n,
                num_warps=LAUNCH.num_warps,
                enable_fp_fusion=True,
            )
    return h


def _bwd_reference(dh, gate, up, form: GluSettings, want_gate: bool, want_up: bool, want_h: bool):
    dtype = wider(gate.dtype, up.dtype)
    f = math_dtype(dtype)
    g, u, d = (t if t.dtype == f else t.to(f) for t in (gate, up, dh))
    dgate, dup = glu_bwd_ref(d, g, u, *form, want_gate, want_up)
    dgate = _like(gate, False) if dgate is None else dgate.to(gate.dtype).contiguous()
    dup = _like(up, False) if dup is None else dup.to(up.dtype).contiguous()
    return dgate, dup, glu_ref(g, u, *form).to(dtype).contiguous() if want_h else _like(gate, False)


def _launch_bwd(dh, gate, up, form: GluSettings, want_gate: bool, want_up: bool, want_h: bool):
    """(dgate, dup, h); what is not wanted has no elements."""
    if not use_triton(gate, up.dtype, dh.dtype):
        return _bwd_reference(dh, gate, up, form, want_gate, want_up, want_h)
    dgate, dup = _like(gate, want_gate), _like(up, want_up)
    h = _h(gate, up) if want_h else _like(gate, False)
    if gate.numel():
        t, (dh2, gate2, up2) = tiled(dh, gate, up)
        with on_device(gate):
            _glu_bwd_kernel[t.grid](
                dh2,
                gate2,
                up2,
                dgate if want_gate else None,
                dup if want_up else None,
                h if want_h else None,
                t.rows,
                t.cols,
                *t.strides[0],
                *t.strides[1],
                *t.strides[2],
                form.alpha,
                form.limit or 0.0,
                form.offset,
                ACT=form.act,
                CLAMP=form.limit is not None,
                BLOCK_M=t.block_m,
                BLOCK_N=t.block_n,
                num_warps=LAUNCH.num_warps,
                enable_fp_fusion=True,
            )
    return dgate, dup, h


@op(
    "glu_bwd(Tensor dh, Tensor gate, Tensor up, str act, float alpha, float? limit, float offset, bool want_gate, bool "
    "want_up)"
    " -> (Tensor, Tensor)",
    lambda dh, gate, up, act, alpha, limit, offset, want_gate, want_up: (_like(gate, want_gate), _like(up, want_up)),
)
def _bwd(dh, gate, up, act, alpha, limit, offset, want_gate, want_up):
    return _launch_bwd(dh, gate, up, GluSettings(act, alpha, limit, offset), want_gate, want_up, False)[:2]


@op(
    "glu_bwd_recompute(Tensor dh, Tensor gate, Tensor up, str act, float alpha, float? limit, float offset)"
    " -> (Tensor, Tensor, Tensor)",
    lambda dh, gate, up, *form: (_like(gate), _like(up), _h(gate, up)),
)
def _bwd_recompute(dh, gate, up, act, alpha, limit, offset):
    return _launch_bwd(dh, gate, up, GluSettings(act, alpha, limit, offset), True, True, True)


# autograd


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, act, alpha, limit, offset):
        ctx.save_for_backward(gate, up)
        ctx.form = (act, alpha, limit, offset)
        return _fwd(gate, up, act, alpha, limit, offset)

    @staticmethod
    def backward(ctx, dh):
        return gradients(ctx, dh)


def gradients(ctx, dh: torch.Tensor) -> tuple:
    """Those of a Function whose arguments are gate, up and the settings, which it left in ctx.form, and which saved
    gate and up."""
    gate, up = ctx.saved_tensors
    want_gate, want_up = ctx.needs_input_grad[:2]
    if higher_order.wanted():
        formula = lambda gate, up: glu_plain(gate, up, *ctx.form)
        return *higher_order.gradients(formula, (gate, up), (want_gate, want_up), (dh,)), None, None, None, None
    dgate, dup = _bwd(dh, gate, up, *ctx.form, want_gate, want_up)
    return dgate if want_gate else None, dup if want_up else None, None, None, None, None


_run = quick_apply(_GLU)
# public


def _form(
    gate: torch.Tensor, up: torch.Tensor, activation: str, alpha: float | None, limit: float | None, up_offset: float
) -> GluSettings:
    _check(gate, up)
    return glu_settings(activation, alpha, limit, up_offset)


def _check(gate: torch.Tensor, up: torch.Tensor) -> None:
    if gate.shape != up.shape or gate.ndim == 0:
        raise ValueError(f"glu: want gate and up of one shape (..., N), got {tuple(gate.shape)} and {tuple(up.shape)}")
    if not (gate.dtype.is_floating_point and up.dtype.is_floating_point):
        raise ValueError(f"glu: want floating dtypes, got {gate.dtype} and {up.dtype}")


def glu_settings(activation: str, alpha: float | None, limit: float | None, up_offset: float) -> GluSettings:
    """`glu`'s settings as the kernels take them. Raises ValueError as `glu`."""
    if limit is not None and not limit > 0:
        raise ValueError(f"glu: want limit > 0 or None, got {limit}")
    act, alpha = resolve(activation, alpha)
    return GluSettings(act, alpha, None if limit is None else float(limit), float(up_offset))


def run(gate: torch.Tensor, up: torch.Tensor, settings: GluSettings) -> torch.Tensor:
    """`glu` of settings that were made before, outside torch.func transforms."""
    _check(gate, up)
    return _run(gate, up, *settings)


def run_again(gate: torch.Tensor, up: torch.Tensor, settings: GluSettings) -> torch.Tensor:
    """`glu_recompute` of settings that were made before."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _fwd(gate, up, *settings)
    return _fwd(gate, up, *settings)


def glu(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    *,
    alpha: float | None = None,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> torch.Tensor:
    """h = act(gate) * (up + up_offset), formulas in the module docstring.

    Args:
        gate, up: [..., N], one shape, float64, float32, float16 or bfloat16, any strides, not modified.
        activation: one of `fastft_kernels.mlp.activation.ACTIVATIONS`.
        alpha: of "silu" and "swiglu_oai", gate * sigmoid(alpha * gate).
        limit: before use gate is clamped to at most limit and up to [-limit, limit]; None does not clamp.
        up_offset: added to up.

    Returns:
        h [..., N], contiguous, in the promoted dtype; math in float32 and one rounding. Differentiable in gate and up
        (each in its own dtype, contiguous), only in what is asked for; saves gate and up alone.

    Raises:
        ValueError: shapes differ, a dtype is not floating, the activation is unknown or does not have an alpha, or
            limit <= 0.
    """
    return applied(_GLU, gate, up, *_form(gate, up, activation, alpha, limit, up_offset))


def glu_recompute(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    *,
    alpha: float | None = None,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> torch.Tensor:
    """The h of `glu`, bit for bit, without autograd: for a backward that kept gate and up only. Arguments and errors as
    `glu`."""
    with torch.no_grad():
        return _fwd(gate, up, *_form(gate, up, activation, alpha, limit, up_offset))


def glu_bwd_recompute(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    *,
    alpha: float | None = None,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dgate, dup, h) in one launch and one reading of gate and up, for the backward of a whole MLP; h has the
    forward's bits.

    dh: the shape of gate, floating, any strides; the rest as `glu`. No autograd. Raises ValueError as `glu`, and where
    dh has another shape."""
    if dh.shape != gate.shape:
        raise ValueError(f"glu: want dh of gate's shape {tuple(gate.shape)}, got {tuple(dh.shape)}")
    with torch.no_grad():
        return _bwd_recompute(dh, gate, up, *_form(gate, up, activation, alpha, limit, up_offset))


def _case(
    kernel, pointers: tuple[str, ...], absent: tuple[str, ...], act: str, t: str, clamp: bool, flat: bool, note: str
) -> AotCase:
    inputs = [p[: -len("_ptr")] for p in pointers if p in ("dh_ptr", "gate_ptr", "up_ptr")]
    signature = dict.fromkeys(pointers, f"*{t}") | {f"{i}_row": "i32" for i in inputs}
    signature |= {"cols": "i32", "alpha": "fp32", "limit": "fp32", "offset": "fp32"}
    constexprs = {"ACT": act, "CLAMP": clamp, "BLOCK_M": 1, "BLOCK_N": LAUNCH.block} | dict.fromkeys(absent)
    constexprs |= {f"{i}_col": 1 for i in inputs}
    (constexprs if flat else signature)["rows"] = 1 if flat else "i32"
    return AotCase(kernel, signature, constexprs, num_warps=LAUNCH.num_warps, note=note, unaligned=("rows",))


AOT_CASES = tuple(
    _case(kernel, pointers, absent, *use)
    for kernel, pointers, absent in (
        (_glu_fwd_kernel, ("gate_ptr", "up_ptr", "h_ptr"), ()),
        (_glu_bwd_kernel, ("dh_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr"), ("h_ptr",)),
        (_glu_bwd_kernel, ("dh_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr", "h_ptr"), ()),
    )
    for use in (
        ("silu", "bf16", False, True, "Llama-3.1-8B, N 14336"),
        ("gelu_tanh", "fp16", False, False, "Gemma, chunks of a fused product"),
        ("gelu", "fp32", False, True, "exact gelu"),
        ("silu", "bf16", True, False, "clamped"),
    )
)
