"""y = act(x), and the activations that `glu` shares.   dx = dy act'(x)   (act' recomputed from x, the only tensor
                                                        saved).

Every activation is written once, as act(x) with its derivative:

    silu        x w,  w = sigmoid(alpha x)              act' = w + alpha x w (1 - w);  alpha = 1 unless given
    quick_gelu  silu with alpha = 1.702
    swiglu_oai  silu with alpha = 1.702 unless given (GPT-OSS; its clamp and its up + 1 are settings of `glu`)
    gelu        x w,  w = (1 + erf(x / sqrt 2)) / 2     act' = w + x exp(-x^2 / 2) / sqrt(2 pi)
    gelu_tanh   x w,  w = sigmoid(z),  z = 2 sqrt(2 / pi) (x + 0.044715 x^3);  equal to x (1 + tanh(z / 2)) / 2
                                                        act' = w + x z' w (1 - w)
    relu        max(x, 0)                               act' = [x > 0]
    relu2       max(x, 0)^2                             act' = 2 max(x, 0)
    sigmoid     w = sigmoid(x)                          act' = w (1 - w)

Shapes (..., N) of any strides; bf16, fp16, fp32 in and out, math in fp32, one rounding; float64 takes the reference,
exactly.
Finite x never gives NaN: sigmoids saturate, and z' is taken at |x| <= 32, beyond which w (1 - w) is 0 in every dtype
here. w (1 - w) is e / (1 + e)^2 with e = exp(-|.|): 1 - w would cancel, and x multiplies what is left."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastft_kernels.runtime import higher_order
from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import math_dtype, on_device, op, use_triton
from fastft_kernels.runtime.language import tl, triton
from fastft_kernels.runtime.precise import erf, exp, sigmoid, sigmoid_grad

QUICK = 1.702
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "quick_gelu", "swiglu_oai")
_K = math.sqrt(2 / math.pi)
_CUBIC = 0.044715
_SATURATED = 32.0


@dataclass(frozen=True)
class ActivationLaunch:
    """block: elements of one program; num_warps: 8 elements a thread, so that it loads 16 bytes of a 16-bit dtype at
    once."""

    block: int = 1024
    num_warps: int = 4


LAUNCH = ActivationLaunch()


def resolve(activation: str, alpha: float | None) -> tuple[str, float]:
    """(name that the kernels know, alpha). Raises ValueError for an unknown name, or for an alpha that it does not
    have."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: want one of {ACTIVATIONS}, got {activation!r}")
    if activation in ("silu", "swiglu_oai"):
        return "silu", float(alpha) if alpha is not None else (1.0 if activation == "silu" else QUICK)
    if alpha is not None:
        raise ValueError(f"activation: want alpha with silu or swiglu_oai only, got alpha={alpha} with {activation!r}")
    return ("silu", QUICK) if activation == "quick_gelu" else (activation, 1.0)


# reference


def act_ref(x: torch.Tensor, act: str, alpha: float) -> torch.Tensor:
    """act(x) in the dtype of x; act, alpha: as `resolve` gives them."""
    if act == "silu":
        return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)
    if act == "gelu":
        return F.gelu(x)
    if act == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if act == "relu":
        return F.relu(x)
    if act == "relu2":
        return F.relu(x).square()
    return torch.sigmoid(x)


def act_grad_ref(x: torch.Tensor, act: str, alpha: float) -> torch.Tensor:
    """act'(x) in the dtype of x."""
    if act == "silu" and alpha == 1:
        s = torch.sigmoid(x)
        return s + torch.sigmoid(-x).mul_(s).mul_(x)
    if act == "silu":
        return torch.sigmoid(alpha * x) + x * _sigmoid_grad_ref(alpha * x) * alpha
    if act == "gelu":
        pdf = torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * pdf
    if act == "gelu_tanh":
        near = x.clamp(-_SATURATED, _SATURATED)
        z = 2 * _K * near * (1 + _CUBIC * near * near)
        return torch.sigmoid(z) + near * _sigmoid_grad_ref(z) * (2 * _K) * (1 + 3 * _CUBIC * near * near)
    if act == "relu":
        return (x > 0).to(x.dtype)
    if act == "relu2":
        return 2 * F.relu(x)
    return _sigmoid_grad_ref(x)


def _sigmoid_grad_ref(z: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)  # 1 - sigmoid(z) would cancel


# kernels. What feeds a rounded output is written so that no multiplication meets an addition, other than in an explicit
# fma: then
# whichever kernel it is inlined in, the compiler cannot contract it differently, and a recomputed value has the
# forward's bits.


@triton.jit
def _gelu_tanh_z(x):
    return 1.5957691216057308 * x * tl.fma(0.044715 * x, x, 1.0)


@triton.jit
def act_weight(x, alpha, ACT: tl.constexpr):
    """w of act(x) = x w (sigmoid, relu, relu2: of act(x) = w, w, w^2)."""
    if ACT == "silu":
        w = sigmoid(alpha * x)
    elif ACT == "gelu":
        w = tl.fma(erf(x * 0.7071067811865476), 0.5, 0.5)
    elif ACT == "gelu_tanh":
        w = sigmoid(_gelu_tanh_z(x))
    elif ACT == "sigmoid":
        w = sigmoid(x)
    else:
        w = tl.where(x <= 0.0, 0.0, x)  # a NaN passes
    return w


@triton.jit
def act_value(x, w, ACT: tl.constexpr):
    """act(x), where w = act_weight(x)."""
    if ACT == "sigmoid" or ACT == "relu":
        a = w
    elif ACT == "relu2":
        a = w * w
    else:
        a = x * w
    return a


@triton.jit
def act_grad(x, w, alpha, ACT: tl.constexpr):
    """act'(x), where w = act_weight(x)."""
    if ACT == "silu":
        d = w + x * sigmoid_grad(alpha * x) * alpha
    elif ACT == "gelu":
        d = w + x * (exp(-0.5 * x * x) * 0.3989422804014327)
    elif ACT == "gelu_tanh":
        near = tl.where(x > 32.0, 32.0, tl.where(x < -32.0, -32.0, x))
        d = w + near * sigmoid_grad(_gelu_tanh_z(near)) * (1.5957691216057308 * tl.fma(0.134145 * near, near, 1.0))
    elif ACT == "sigmoid":
        d = sigmoid_grad(x)
    elif ACT == "relu":
        d = tl.where(x > 0.0, 1.0, 0.0)
    else:
        d = 2.0 * w
    return d


@triton.jit
def tile_of(rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row numbers, column numbers, mask) of this program: tiles run along a row first. int64."""
    pid = tl.program_id(0)
    per_row = tl.cdiv(cols, BLOCK_N)
    r = (pid // per_row).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    c = (pid % per_row).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    return r, c, (r < rows) & (c < cols)


@triton.jit
def _act_fwd_kernel(
    x_ptr, y_ptr, rows, cols, x_row, x_col, alpha, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    r, c, mask = tile_of(rows, cols, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + r * x_row + c * x_col, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    y = act_value(x, act_weight(x, alpha, ACT), ACT)
    tl.store(y_ptr + r * cols + c, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _act_bwd_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    rows,
    cols,
    dy_row,
    dy_col,
    x_row,
    x_col,
    alpha,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    r, c, mask = tile_of(rows, cols, BLOCK_M, BLOCK_N)
    x = tl.load(x_ptr + r * x_row + c * x_col, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    dy = tl.load(dy_ptr + r * dy_row + c * dy_col, mask=mask, other=0.0).to(tl.float32)
    dx = dy * act_grad(x, act_weight(x, alpha, ACT), alpha, ACT)
    tl.store(dx_ptr + r * cols + c, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# launchers


@dataclass(frozen=True)
class Tiling:
    """How inputs are walked: rows x cols elements in tiles of block_m x block_n; strides: (row, column) of each
    input."""

    rows: int
    cols: int
    block_m: int
    block_n: int
    strides: tuple[tuple[int, int], ...]

    @property
    def grid(self) -> tuple[int]:
        return (-(-self.rows // self.block_m) * -(-self.cols // self.block_n),)


def tiled(*inputs: torch.Tensor) -> tuple[Tiling, tuple[torch.Tensor, ...]]:
    """The inputs (one shape, not empty) as matrices over their last dim, and how to walk them.

    A view is copied only where its leading dims are not evenly spaced: a chunk, an interleaved or expanded view is read
    in place."""
    n = inputs[0].shape[-1] if inputs[0].dim() else 1
    xs = tuple(x.reshape(-1, n) for x in inputs)
    rows, cols = xs[0].shape
    strides = tuple((x.stride(0), x.stride(1)) for x in xs)
    if rows == 1 or all(r == cols * c for r, c in strides):  # one long row: no tile is cut at a row's end
        rows, cols, strides = 1, rows * cols, tuple((0, c) for _, c in strides)
    block_n = min(LAUNCH.block, triton.next_power_of_2(cols))
    block_m = min(LAUNCH.block // block_n, triton.next_power_of_2(rows))
    return Tiling(rows, cols, block_m, block_n, strides), xs


def _like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@op("act_fwd(Tensor x, str act, float alpha) -> Tensor", lambda x, act, alpha: _like(x))
def _fwd(x, act, alpha):
    if not use_triton(x):
        return act_ref(x.to(math_dtype(x.dtype)), act, alpha).to(x.dtype).contiguous()
    y = _like(x)
    if y.numel():
        t, (x2,) = tiled(x)
        with on_device(x):
            _act_fwd_kernel[t.grid](
                x2,
                y,
                t.rows,
                t.cols,
                *t.strides[0],
                alpha,
                ACT=act,
                BLOCK_M=t.block_m,
                BLOCK_N=t.block_n,
                num_warps=LAUNCH.num_warps,
                enable_fp_fusion=True,
            )
    return y


@op("act_bwd(Tensor dy, Tensor x, str act, float alpha) -> Tensor", lambda dy, x, act, alpha: _like(x))
def _bwd(dy, x, act, alpha):
    if not use_triton(x):
        x_ = x.to(math_dtype(x.dtype))
        return (dy.to(x_.dtype) * act_grad_ref(x_, act, alpha)).to(x.dtype).contiguous()
    dx = _like(x)
    if dx.numel():
        t, (dy2, x2) = tiled(dy, x)
        with on_device(x):
            _act_bwd_kernel[t.grid](
                dy2,
                x2,
                dx,
                t.rows,
                t.cols,
                *t.strides[0],
                *t.strides[1],
                alpha,
                ACT=act,
                BLOCK_M=t.block_m,
                BLOCK_N=t.block_n,
                num_warps=LAUNCH.num_warps,
                enable_fp_fusion=True,
            )
    return dx


# autograd


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, act, alpha):
        ctx.save_for_backward(x)
        ctx.act, ctx.alpha = act, alpha
        return _fwd(x, act, alpha)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if higher_order.wanted():
            formula = lambda x: act_ref(x.to(math_dtype(x.dtype)), ctx.act, ctx.alpha).to(x.dtype)
            return *higher_order.gradients(formula, (x,), (True,), (dy,)), None, None
        return _bwd(dy, x, ctx.act, ctx.alpha), None, None


# public


def activation(x: torch.Tensor, activation: str = "silu", *, alpha: float | None = None) -> torch.Tensor:
    """y = act(x), formulas in the module docstring.

    Args:
        x: [..., N], float64, float32, float16 or bfloat16, any strides, not modified.
        activation: one of ACTIVATIONS.
        alpha: with "silu" and "swiglu_oai".

    Returns:
        y [..., N], contiguous, in the dtype of x; math in float32 and one rounding. Differentiable in x; saves x alone.

    Raises:
        ValueError: the activation is unknown or does not have an alpha, or x is not floating.
    """
    act, alpha = resolve(activation, alpha)
    if not x.is_floating_point():
        raise ValueError(f"activation: want a floating dtype, got {x.dtype}")
    return _Activation.apply(x, act, alpha)


_FP = {"cols": "i32", "alpha": "fp32"}
AOT_CASES = tuple(
    AotCase(
        kernel,
        dict.fromkeys(pointers, f"*{t}") | dict.fromkeys(rows, "i32") | _FP,
        {"ACT": act, "rows": 1, "BLOCK_M": 1, "BLOCK_N": LAUNCH.block, **dict.fromkeys(columns, 1)},
        num_warps=LAUNCH.num_warps,
        note=f"{act}, contiguous {t}",
    )
    for kernel, pointers, rows, columns in (
        (_act_fwd_kernel, ("x_ptr", "y_ptr"), ("x_row",), ("x_col",)),
        (_act_bwd_kernel, ("dy_ptr", "x_ptr", "dx_ptr"), ("x_row", "dy_row"), ("x_col", "dy_col")),
    )
    for act, t in (("gelu", "bf16"), ("gelu_tanh", "fp16"), ("relu2", "fp32"))
)
