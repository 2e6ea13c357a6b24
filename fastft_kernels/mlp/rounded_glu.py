"""`glu`'s h, and h's rows in e4m3 with their scales, in one launch: for a product in FP8 that reads h.

h, q, scale are the bits of `glu` and of `quantize_e4m3_rows` one after the other, and the gradients are `glu`'s. A
program has whole rows, up to the widest tile of `rows`; wider ones take two launches."""

from __future__ import annotations

import torch

from fastft_kernels.mlp.glu import GluSettings, gradients, run_again, value
from fastft_kernels.quant.fp8 import CASTS_E4M3, E4M3, casts_in_hardware, quantize_e4m3_rows, store_rows
from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import on_device, op, quick_apply, use_triton, wider
from fastft_kernels.runtime.language import tl, triton
from fastft_kernels.runtime.rows import FWD_TILES, row_launch

# reference


def glu_rounded_ref(
    gate: torch.Tensor, up: torch.Tensor, settings: GluSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate, up [..., N] -> (h, q [rows, N], scale [rows, 1])."""
    h = run_again(gate, up, settings)
    return h, *quantize_e4m3_rows(h.reshape(_rows(h), h.shape[-1]))


def _rows(h: torch.Tensor) -> int:
    return h.numel() // h.shape[-1] if h.shape[-1] else 0


# kernel


@triton.jit
def _glu_rounded_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    q_ptr,
    scale_ptr,
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
    HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, col = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    r, c = row.to(tl.int64)[:, None], col.to(tl.int64)[None, :]
    mask = (r < rows) & (c < cols)
    g = tl.load(gate_ptr + r * gate_row + c * gate_col, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    u = tl.load(up_ptr + r * up_row + c * up_col, mask=mask, other=0.0).to(tl.float32)
    h = value(g, u, alpha, limit, offset, ACT, CLAMP).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + r * cols + c, h, mask=mask)
    store_rows(tl.where(mask, h.to(tl.float32), 0.0), q_ptr, scale_ptr, row, col, rows, cols, HARDWARE)


# launcher


def _fake(gate, up, *form):
    q = gate.new_empty((_rows(gate), gate.shape[-1]), dtype=E4M3)
    h = gate.new_empty(gate.shape, dtype=wider(gate.dtype, up.dtype))
    return h, q, gate.new_empty((_rows(gate), 1), dtype=torch.float32)


@op(
    "glu_fwd_rounded(Tensor gate, Tensor up, str act, float alpha, float? limit, float offset)"
    " -> (Tensor, Tensor, Tensor)",
    _fake,
)
def _fwd(gate, up, act, alpha, limit, offset):
    n, launch = gate.shape[-1], row_launch(gate.shape[-1], FWD_TILES)
    if not use_triton(gate, up.dtype) or launch.wide or not gate.numel():
        return glu_rounded_ref(gate, up, GluSettings(act, alpha, limit, offset))
    h = gate.new_empty(gate.shape, dtype=wider(gate.dtype, up.dtype))
    gate, up, rows = gate.reshape(-1, n), up.reshape(-1, n), _rows(h)
    q, scale = gate.new_empty((rows, n), dtype=torch.uint8), gate.new_empty((rows, 1), dtype=torch.float32)
    with on_device(h):
        _glu_rounded_kernel[(launch.programs(rows),)](
            gate,
            up,
            h,
            q,
            scale,
            rows,
            n,
            *gate.stride(),
            *up.stride(),
            alpha,
            limit or 0.0,
            offset,
            ACT=act,
            CLAMP=limit is not None,
            HARDWARE=casts_in_hardware(h),
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            num_warps=launch.num_warps,
            enable_fp_fusion=True,
        )
    return h, q.view(E4M3), scale


# autograd


class _GLURounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, act, alpha, limit, offset):
        ctx.save_for_backward(gate, up)
        ctx.form = (act, alpha, limit, offset)
        h, q, scale = _fwd(gate, up, act, alpha, limit, offset)
        ctx.mark_non_differentiable(q, scale)
        ctx.set_materialize_grads(False)
        return h, q, scale

    @staticmethod
    def backward(ctx, dh, *_):
        return (None,) * 6 if dh is None else gradients(ctx, dh)


_run = quick_apply(_GLURounded)
# public


def run_rounded(
    gate: torch.Tensor, up: torch.Tensor, settings: GluSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate, up [..., N], as `glu` takes them -> (h, differentiable as `glu`'s; q [rows, N] float8_e4m3fn, scale
    [rows, 1] float32, without a gradient). Outside torch.func transforms. Raises ValueError for two shapes."""
    if gate.shape != up.shape or gate.ndim == 0:
        raise ValueError(
            f"run_rounded: want gate and up of one shape (..., N), got {tuple(gate.shape)} and {tuple(up.shape)}"
        )
    return _run(gate, up, *settings)


def AOT_CASES(arch: str) -> tuple[AotCase, ...]:
    """An 8B's and a 1B's feed-forward width."""
    dtype = "fp16" if arch == "sm_75" else "bf16"
    pointers = dict.fromkeys(("gate_ptr", "up_ptr", "h_ptr"), f"*{dtype}") | {"q_ptr": "*u8", "scale_ptr": "*fp32"}
    sizes = {"rows": "i32", "cols": "i32", "gate_row": "i32", "up_row": "i32"}
    settings = dict.fromkeys(("alpha", "limit", "offset"), "fp32")

    def case(n: int, act: str, clamp: bool, note: str) -> AotCase:
        launch = row_launch(n, FWD_TILES)
        constants = {"ACT": act, "CLAMP": clamp, "HARDWARE": arch in CASTS_E4M3, "gate_col": 1, "up_col": 1}
        constants |= {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
        signature = pointers | sizes | settings
        return AotCase(_glu_rounded_kernel, signature, constants, launch.num_warps, note=note, unaligned=("rows",))

    return (case(14336, "silu", False, "Llama-3.1-8B"), case(8192, "gelu_tanh", True, "clamped, Llama-3.2-1B's width"))
