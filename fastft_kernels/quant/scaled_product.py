"""The two products of a frozen FP8 weight W = diag(s) q, both in FP8, from its one copy:

    y  = x W^T        = diag(sx) (qx q^T) diag(s)          qx, sx: the rows of x quantised
    dx = dy W         = diag(sg) (qg q)                    qg, sg: the rows of dy diag(s) quantised

The weight's scales stand on the reduction of dx, where no product takes them: they go into dy before it is rounded. q
is transposed on demand, as the hardware wants it, into memory that lives as long as the product: at most one transposed
weight is there at a time, and the next one takes its place. Products of e4m3 are exact in float32, where they are
summed: `use_fast_accum=False`, as Hopper's fast sum keeps 14 bits between whole steps of the accumulator.

Where they apply: scales by row, both sides of W multiples of 16, a device with FP8 units (compute capability 8.9 or
more) and results in bfloat16; on a CPU the same arithmetic in float32, and in float64 for a proof. Elsewhere the weight
is made dense for the product, and nothing but it is rounded to FP8.

`specified` is the arithmetic in plain torch, one line each: what the proof and the tests hold the kernels to."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastft_kernels.quant.fp8 import quantize_e4m3_rows, quantize_rows_ref
from fastft_kernels.quant.transpose import transpose_8bit
from fastft_kernels.quant.weights import WeightLayout, expand
from fastft_kernels.runtime.compat import dispatch_modes, is_dynamo_compiling, scaled_mm
from fastft_kernels.runtime.dispatch import goes_to_cuda, math_dtype

PRODUCTS = ("", "forward", "both")
MULTIPLE = 16  # of both sides of a weight
NO_UNITS = "its device has no FP8 units"


class Quantized(NamedTuple):
    """The rows of a matrix in e4m3, and their scales [T, 1]."""

    q: torch.Tensor
    scale: torch.Tensor


class Underflow:
    """How much of the gradients is rounded to zero, by the shape of the weight: looked at in the first backwards, in
    some of their tokens. What is seen stays on the device until it is asked for."""

    backwards, tokens = 64, 512

    def __init__(self) -> None:
        self.seen: dict[tuple[int, ...], tuple[int, torch.Tensor]] = {}

    def look(self, dy: torch.Tensor, q: torch.Tensor, shape: tuple[int, ...]) -> None:
        """dy [T, out] and what became of it."""
        calls, counts = self.seen.get(shape, (0, None))
        if calls >= self.backwards or is_dynamo_compiling() or dispatch_modes() or not len(dy):
            return
        if dy.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        step = -(-len(dy) // self.tokens)
        live = dy[::step] != 0
        lost = live & (q[::step].view(torch.uint8) & 0x7F == 0)
        now = torch.stack([lost.sum(), live.sum()])
        self.seen[shape] = (calls + 1, now if counts is None else counts + now)

    def shares(self) -> dict[tuple[int, ...], float]:
        """{shape of the weight: the share of what was not zero and is now}; waits for the device."""
        found = {shape: counts.tolist() for shape, (_, counts) in self.seen.items()}
        return {shape: lost / max(live, 1) for shape, (lost, live) in found.items()}


def why_dense(layout: WeightLayout, compute: torch.dtype, device: torch.device, planned: bool = False) -> str:
    """Why a float8 weight is made dense for its products in the dtype `compute`; empty where they are in FP8. planned:
    a CPU that stands for a CUDA device."""
    block, products, _ = layout.options
    if not products:
        return "no FP8 products were asked for"
    if block is not None:
        return f"its scales are those of blocks of {block[0]} x {block[1]}"
    if any(side % MULTIPLE for side in layout.shape):
        return f"its shape {layout.shape} is no multiple of {MULTIPLE}"
    if compute == torch.float64 or (device.type == "cpu" and not planned):
        return ""
    if compute != torch.bfloat16:
        return f"it computes in {str(compute).removeprefix('torch.')}"
    return "" if planned or has_units(device) else NO_UNITS


def has_units(device: torch.device) -> bool:
    """Does this device multiply FP8 matrices with a scale for each row?"""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def applies(layout: WeightLayout, compute: torch.dtype, x: torch.Tensor, backward: bool = False) -> bool:
    """Is this weight's product with x (or, backward, with dy) in `compute` one of FP8 matrices?"""
    if layout.kind != "float8" or (backward and layout.options[1] != "both"):
        return False
    return not why_dense(layout, compute, x.device, goes_to_cuda(x))


def quantized(x: torch.Tensor, columns: torch.Tensor | None = None) -> Quantized:
    """The rows of x [T, n], each column times columns [n, 1] if given."""
    return Quantized(*quantize_e4m3_rows(x, None if columns is None else columns.view(-1)))


def scaled(a: Quantized, b: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """diag(a.scale) a.q b.q^T diag(b.scale): a [T, k], b [n, k] -> [T, n] in `dtype`."""
    if goes_to_cuda(a.q) and dtype != torch.float64:
        if not a.q.shape[0]:
            return a.scale.new_zeros((0, b.q.shape[0]), dtype=dtype)
        y = scaled_mm(
            a.q, b.q.t(), scale_a=a.scale, scale_b=b.scale.t(), out_dtype=torch.bfloat16, use_fast_accum=False
        )
        return y.to(dtype)
    wide = math_dtype(dtype)
    y = torch.mm(a.q.to(wide), b.q.to(wide).t())
    return y.mul_(a.scale).mul_(b.scale.t()).to(dtype)


def product(x: Quantized, q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """y [T, out] in `dtype` of the rows of x [T, in]; q [out, in], scale [out, 1]."""
    return scaled(x, Quantized(q, scale), dtype)


def input_gradient(
    dy: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    underflow: Underflow | None = None,
) -> torch.Tensor:
    """dx [T, in] in `dtype` of dy [T, out]; q [out, in], scale [out, 1]. underflow: what looks at the rounded dy."""
    rounded = quantized(dy, scale)
    if underflow is not None:
        underflow.look(dy, rounded.q, tuple(q.shape))
    one = scale.new_ones((q.shape[1], 1))
    return scaled(rounded, Quantized(transpose_8bit(q), one), dtype)


# the specification


def _rounded(x: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
    # of float64 the operator is the reference, whatever a mode that listens takes float32 for
    if x.dtype == torch.float64:
        q, scale = torch.ops.fastft.quantize_e4m3_rows.default(x, columns)
    else:
        q, scale = quantize_rows_ref(x, columns)
    return q.to(math_dtype(x.dtype)) * scale


class _Specified(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, layout: WeightLayout):
        ctx.save_for_backward(q, scale)
        ctx.layout = layout
        wide = math_dtype(x.dtype)
        return (_rounded(x) @ (q.to(wide) * scale).t()).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        q, scale = ctx.saved_tensors
        wide = math_dtype(dy.dtype)
        if ctx.layout.options[1] != "both":
            return dy @ expand(ctx.layout, (q, scale), dy.dtype), None, None, None
        return (_rounded(dy, scale.view(-1)) @ q.to(wide)).to(dy.dtype), None, None, None


def specified(x: torch.Tensor, layout: WeightLayout, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x W^T [..., out] in x's dtype, of x [..., in], as plain torch computes what this module is for: each operand
    rounded to e4m3 where FP8 products apply, exact (float64) or float32 products, and a gradient for x that is rounded
    the same way."""
    with torch.autocast(x.device.type, enabled=False):
        if why_dense(layout, x.dtype, x.device):
            return x @ expand(layout, (q, scale), x.dtype).t()
        flat = x.reshape(-1, x.shape[-1])
        return _Specified.apply(flat, q, scale, layout).view(*x.shape[:-1], q.shape[0])
