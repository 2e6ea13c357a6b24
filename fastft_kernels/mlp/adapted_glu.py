"""The middle of a gated MLP with its adapters' products inside: h = act(g) (u + o) as `glu`, where

    g = gate + s_g xA_g B_g^T        u = up + s_u xA_u B_u^T          gate, up: the outputs of the frozen products alone

    dh = dh0 + dhA A_d               what comes back through down: the frozen product's part, and the adapter's
    dgate, dup                       as `glu`, of g and u
    dB_g  = s_g dgate^T xA_g         dB_u  = s_u dup^T xA_u           dA_d = dhA^T h   (h recomputed, never kept)

g, u, dh and h exist on the chip alone. Apart from the kernel, an adapter's product is added by reading and writing its
output once more, h is written and read again for dA_d, and dB_g and dB_u read dgate and dup again: twelve passes over a
matrix [T, N]. Here there is none of them. (dgate B_g and dup B_u are left to ordinary products: their sums over a row
would be written in as many parts as there are blocks of columns, which is more than reading dgate and dup once.)

gate, up, dh0: [T, N] contiguous; xA [T, r_g + r_u] (gate's columns first), dhA [T, r_d] = s_d dy B_d, rows contiguous;
B_g [N, r_g], B_u [N, r_u], A_d [r_d, N] contiguous; all of one dtype: bf16, fp16, fp32. Products and sums in float32;
dgate, dup and h are rounded to the dtype before they are multiplied, as they are apart. float64 takes the reference.

The backward walks down the rows with a block of columns: what is summed over rows stays in registers, and is written
once for ROWS rows. `adapted_glu_sums` adds these parts in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastft_kernels.mlp.activation import act_grad, act_value, act_weight
from fastft_kernels.mlp.glu import GluSettings, glu_bwd_ref, glu_ref
from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import math_dtype, on_device, op, use_triton
from fastft_kernels.runtime.language import tl, triton

MAX_RANK = 32  # of each adapter: the sums of a block of columns are in registers


@dataclass(frozen=True)
class AdaptedGluLaunch:
    """Tiles of a kernel. The backward walks down ROWS rows with one of its tiles."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1


FWD = AdaptedGluLaunch(32, 128, 8)
# of the backward by padded rank: on Hopper and datacentre Blackwell, whose matrix units take operands from shared
# memory, and elsewhere, where they take registers
BWD_WIDE = {16: AdaptedGluLaunch(16, 128, 8, 2), 32: AdaptedGluLaunch(16, 64, 4, 2)}
BWD = {16: AdaptedGluLaunch(16, 32, 4), 32: AdaptedGluLaunch(16, 32, 4)}
SUM_BLOCK = 1024
ROWS = 2048  # that one program of the backward walks


def bwd_launch(rank: int, major: int) -> AdaptedGluLaunch:
    """For adapters of a padded rank on a device of this major compute capability (0: AMD's and others)."""
    return (BWD_WIDE if major in (9, 10) else BWD)[rank]


def capability_of(x: torch.Tensor) -> int:
    """The major compute capability of x's device; 0 where it has none."""
    if not x.is_cuda or torch.version.hip:
        return 0
    return torch.cuda.get_device_capability(x.device)[0]


class Ranks(NamedTuple):
    """Of the adapters of gate, up and down."""

    gate: int
    up: int
    down: int

    @property
    def padded(self) -> int:
        """Columns of a product on the chip."""
        return max(16, triton.next_power_of_2(max(self)))


# reference


def _parts_ref(gate, up, xA, Bg, Bu, sg: float, su: float):
    """g and u in the dtype of the operands."""
    r = Bg.shape[1]
    return gate + (xA[:, :r] @ Bg.t()) * sg, up + (xA[:, r:] @ Bu.t()) * su


def adapted_glu_ref(gate, up, xA, Bg, Bu, sg: float, su: float, form: GluSettings) -> torch.Tensor:
    """h in the dtype of the operands."""
    return glu_ref(*_parts_ref(gate, up, xA, Bg, Bu, sg, su), *form)


def adapted_glu_bwd_ref(dh0, dhA, gate, up, xA, Bg, Bu, Ad, sg: float, su: float, form: GluSettings, dtype):
    """(dgate, dup, [dB_g, dB_u, dA_d] as one vector). dtype: that in which dgate, dup and h are multiplied."""
    r = Bg.shape[1]
    g, u = _parts_ref(gate, up, xA, Bg, Bu, sg, su)
    dh = dh0 + dhA @ Ad
    h = glu_ref(g, u, *form).to(dtype).to(dh.dtype)
    dgate, dup = (d.to(dtype).to(dh.dtype) for d in glu_bwd_ref(dh, g, u, *form, True, True))
    grads = ((dgate.t() @ xA[:, :r]) * sg, (dup.t() @ xA[:, r:]) * su, dhA.t() @ h)
    return dgate, dup, torch.cat([d.flatten() for d in grads])


# kernels


@triton.jit
def _columns(ptr, rows, n_rows, first, rank, stride, R: tl.constexpr):
    """rows x columns first..first + rank of a matrix, padded with zeros to [len(rows), R]."""
    k = tl.arange(0, R)[None, :]
    return tl.load(ptr + rows * stride + first + k, mask=(rows < n_rows) & (k < rank), other=0.0)


@triton.jit
def _adapted(base, xA, B, scale):
    """base + scale xA B^T in float32: [M, R], [N, R] -> [M, N]."""
    return tl.fma(tl.dot(xA, tl.trans(B), input_precision="ieee"), scale, base)


@triton.jit
def _adapted_fwd_kernel(
    gate_ptr,
    up_ptr,
    xA_ptr,
    Bg_ptr,
    Bu_ptr,
    h_ptr,
    rows,
    cols,
    xA_row,
    rank_g,
    rank_u,
    scale_g,
    scale_u,
    alpha,
    limit,
    offset,
    ACT: tl.constexpr,
    CLAMP: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # neighbouring programs share a block of columns, so B's: the rows of xA come from the cache either way
    blocks = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    m = (pid % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    first = (pid // blocks).to(tl.int64) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    nb = first + tl.arange(0, BLOCK_N)[:, None]
    mask = (m < rows) & (n < cols)
    to = m * cols + n
    g = tl.load(gate_ptr + to, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    u = tl.load(up_ptr + to, mask=mask, other=0.0).to(tl.float32)
    g = _adapted(
        g, _columns(xA_ptr, m, rows, 0, rank_g, xA_row, R), _columns(Bg_ptr, nb, cols, 0, rank_g, rank_g, R), scale_g
    )
    u = _adapted(
        u,
        _columns(xA_ptr, m, rows, rank_g, rank_u, xA_row, R),
        _columns(Bu_ptr, nb, cols, 0, rank_u, rank_u, R),
        scale_u,
    )
    if CLAMP:  # comparisons that let NaN through
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    h = act_value(g, act_weight(g, alpha, ACT), ACT) * (u + offset)
    tl.store(h_ptr + to, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adapted_bwd_kernel(
    dh_ptr,
    dhA_ptr,
    gate_ptr,
    up_ptr,
    xA_ptr,
    Bg_ptr,
    Bu_ptr,
    Ad_ptr,
    dgate_ptr,
    dup_ptr,
    parts_ptr,  # [blocks of ROWS rows, cols (rank_g + rank_u + rank_d)] float32: parts of dB_g, dB_u, dA_d
    rows,
    cols,
    xA_row,
    dhA_row,
    rank_g,
    rank_u,
    rank_d,
    scale_g,
    scale_u,
    alpha,
    limit,
    offset,
    ACT: tl.constexpr,
    CLAMP: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    nb = block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BLOCK_N, 1]
    k = tl.arange(0, R)[None, :]
    kd = tl.arange(0, R)[:, None]
    dtype = dgate_ptr.dtype.element_ty
    Bg = _columns(Bg_ptr, nb, cols, 0, rank_g, rank_g, R)  # [BLOCK_N, R]
    Bu = _columns(Bu_ptr, nb, cols, 0, rank_u, rank_u, R)
    Ad = tl.load(Ad_ptr + kd * cols + n, mask=(kd < rank_d) & (n < cols), other=0.0)  # [R, BLOCK_N]
    dBg = tl.zeros((BLOCK_N, R), dtype=tl.float32)
    dBu = tl.zeros((BLOCK_N, R), dtype=tl.float32)
    dAd = tl.zeros((BLOCK_N, R), dtype=tl.float32)  # transposed
    last = tl.minimum(ROWS, rows - tl.program_id(1) * ROWS)
    for step in range(0, last, BLOCK_M):
        m = part * ROWS + step + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
        mask = (m < rows) & (n < cols)
        to = m * cols + n
        xAg = _columns(xA_ptr, m, rows, 0, rank_g, xA_row, R)  # [BLOCK_M, R]
        xAu = _columns(xA_ptr, m, rows, rank_g, rank_u, xA_row, R)
        dhA = _columns(dhA_ptr, m, rows, 0, rank_d, dhA_row, R)
        g = _adapted(tl.load(gate_ptr + to, mask=mask, other=0.0).to(tl.float32), xAg, Bg, scale_g)
        u = _adapted(tl.load(up_ptr + to, mask=mask, other=0.0).to(tl.float32), xAu, Bu, scale_u)
        dh = tl.load(dh_ptr + to, mask=mask, other=0.0).to(tl.float32)
        dh = tl.dot(dhA, Ad, dh, input_precision="ieee")
        if CLAMP:
            gate_passes = g <= limit
            up_passes = tl.abs(u) <= limit
            g = tl.where(g > limit, limit, g)
            u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        w = act_weight(g, alpha, ACT)
        a = act_value(g, w, ACT)
        u += offset
        # rows and columns beyond the edge hold no zeros in h where up is offset: the mask is theirs
        h = tl.where(mask, a * u, 0.0).to(dtype)
        dAd = tl.dot(tl.trans(h), dhA, dAd, input_precision="ieee")
        dup = dh * a
        if CLAMP:
            dup = tl.where(up_passes, dup, 0.0)
        dup = dup.to(dtype)
        tl.store(dup_ptr + to, dup, mask=mask)
        dBu = tl.dot(tl.trans(dup), xAu, dBu, input_precision="ieee")
        dgate = dh * u * act_grad(g, w, alpha, ACT)
        if CLAMP:
            dgate = tl.where(gate_passes, dgate, 0.0)
        dgate = dgate.to(dtype)
        tl.store(dgate_ptr + to, dgate, mask=mask)
        dBg = tl.dot(tl.trans(dgate), xAg, dBg, input_precision="ieee")
    into = parts_ptr + part * cols * (rank_g + rank_u + rank_d)
    tl.store(into + nb * rank_g + k, dBg * scale_g, mask=(nb < cols) & (k < rank_g))
    into += cols * rank_g
    tl.store(into + nb * rank_u + k, dBu * scale_u, mask=(nb < cols) & (k < rank_u))
    into += cols * rank_u
    tl.store(into + k.to(tl.int64) * cols + nb, dAd, mask=(nb < cols) & (k < rank_d))


@triton.jit
def _sums_kernel(parts_ptr, out_ptr, parts, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(parts):
        total += tl.load(parts_ptr + i, mask=i < size, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)


# launchers


@op(
    "adapted_glu_fwd(Tensor gate, Tensor up, Tensor xA, Tensor Bg, Tensor Bu, float sg, float su, str act, "
    "float alpha, float? limit, float offset) -> Tensor",
    lambda gate, *rest: torch.empty_like(gate),
)
def adapted_glu_fwd(gate, up, xA, Bg, Bu, sg, su, act, alpha, limit, offset):
    """h [T, N]."""
    if not use_triton(gate):
        f = math_dtype(gate.dtype)
        operands = (t.to(f) for t in (gate, up, xA, Bg, Bu))
        return adapted_glu_ref(*operands, sg, su, GluSettings(act, alpha, limit, offset)).to(gate.dtype)
    h = torch.empty_like(gate)
    rows, cols = gate.shape
    if h.numel():
        with on_device(h):
            _adapted_fwd_kernel[(triton.cdiv(rows, FWD.block_m) * triton.cdiv(cols, FWD.block_n),)](
                gate,
                up,
                xA,
                Bg,
                Bu,
                h,
                rows,
                cols,
                xA.stride(0),
                Bg.shape[1],
                Bu.shape[1],
                sg,
                su,
                alpha,
                limit or 0.0,
                offset,
                ACT=act,
                CLAMP=limit is not None,
                R=Ranks(Bg.shape[1], Bu.shape[1], 1).padded,
                BLOCK_M=FWD.block_m,
                BLOCK_N=FWD.block_n,
                num_warps=FWD.num_warps,
                num_stages=FWD.num_stages,
                enable_fp_fusion=True,
            )
    return h


def _parts(gate: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Uninitialised parts of the parameters' gradients."""
    rows, cols = gate.shape
    parts = -(-rows // ROWS)
    return gate.new_empty((parts, cols * sum(ranks)), dtype=math_dtype(gate.dtype))


def _fake_bwd(dh0, dhA, gate, up, xA, Bg, Bu, Ad, *rest):
    parts = _parts(gate, Ranks(Bg.shape[1], Bu.shape[1], Ad.shape[0]))
    return torch.empty_like(gate), torch.empty_like(gate), parts


@op(
    "adapted_glu_bwd(Tensor dh0, Tensor dhA, Tensor gate, Tensor up, Tensor xA, Tensor Bg, Tensor Bu, Tensor Ad, "
    "float sg, float su, str act, float alpha, float? limit, float offset) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
)
def adapted_glu_bwd(dh0, dhA, gate, up, xA, Bg, Bu, Ad, sg, su, act, alpha, limit, offset):
    """(dgate, dup, parts of [dB_g, dB_u, dA_d] for `adapted_glu_sums`)."""
    ranks = Ranks(Bg.shape[1], Bu.shape[1], Ad.shape[0])
    parts = _parts(gate, ranks)
    if not use_triton(gate):
        form = GluSettings(act, alpha, limit, offset)
        operands = (t.to(parts.dtype) for t in (dh0, dhA, gate, up, xA, Bg, Bu, Ad))
        dgate, dup, grads = adapted_glu_bwd_ref(*operands, sg, su, form, gate.dtype)
        parts.zero_()[:1] = grads
        return dgate.to(gate.dtype), dup.to(gate.dtype), parts
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    rows, cols = gate.shape
    launch = bwd_launch(ranks.padded, capability_of(gate))
    if gate.numel():
        with on_device(gate):
            _adapted_bwd_kernel[(triton.cdiv(cols, launch.block_n), parts.shape[0])](
                dh0,
                dhA,
                gate,
                up,
                xA,
                Bg,
                Bu,
                Ad,
                dgate,
                dup,
                parts,
                rows,
                cols,
                xA.stride(0),
                dhA.stride(0),
                *ranks,
                sg,
                su,
                alpha,
                limit or 0.0,
                offset,
                ACT=act,
                CLAMP=limit is not None,
                R=ranks.padded,
                ROWS=ROWS,
                BLOCK_M=launch.block_m,
                BLOCK_N=launch.block_n,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                enable_fp_fusion=True,
            )
    return dgate, dup, parts


@op(
    "adapted_glu_sums(Tensor parts, ScalarType dtype) -> Tensor", lambda p, dtype: p.new_empty(p.shape[1:], dtype=dtype)
)
def adapted_glu_sums(parts, dtype):
    """[dB_g, dB_u, dA_d] as one vector: the parts of `adapted_glu_bwd`, added in order."""
    if not use_triton(parts, dtype):
        return parts.sum(0).to(dtype)
    grads = parts.new_empty(parts.shape[1:], dtype=dtype)
    if grads.numel():
        with on_device(parts):
            _sums_kernel[(triton.cdiv(grads.numel(), SUM_BLOCK),)](
                parts, grads, parts.shape[0], grads.numel(), BLOCK=SUM_BLOCK, num_warps=4, enable_fp_fusion=True
            )
    return grads


_FORM = {"alpha": "fp32", "limit": "fp32", "offset": "fp32", "scale_g": "fp32", "scale_u": "fp32"}
_SIZES = dict.fromkeys(("rows", "cols", "xA_row", "rank_g", "rank_u"), "i32")


def _case(backward: bool, t: str, act: str, clamp: bool, rank: int, archs: tuple[str, ...]) -> AotCase:
    names = ["gate", "up", "xA", "Bg", "Bu"] + (["dh", "dhA", "Ad", "dgate", "dup"] if backward else ["h"])
    launch = bwd_launch(rank, {"sm_90": 9, "sm_100": 10}.get(archs[0], 0)) if backward else FWD
    signature: dict = dict.fromkeys((f"{n}_ptr" for n in names), f"*{t}") | _FORM | _SIZES
    constexprs = {"ACT": act, "CLAMP": clamp, "R": rank, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
    if backward:
        signature |= {"parts_ptr": "*fp32", "dhA_row": "i32", "rank_d": "i32"}
        constexprs["ROWS"] = ROWS
    kernel = _adapted_bwd_kernel if backward else _adapted_fwd_kernel
    note = f"Llama-3.1-8B, N 14336, r {rank}, {act}, {t}" + (", clamped" if clamp else "")
    return AotCase(
        kernel, signature, constexprs, num_warps=launch.num_warps, num_stages=launch.num_stages, note=note, archs=archs
    )


def AOT_CASES(arch: str) -> tuple[AotCase, ...]:
    """Not for sm_75: its matrix units take no bfloat16, and Triton does not use them for float16."""
    if arch == "sm_75":
        return ()
    sums = {"parts_ptr": "*fp32", "out_ptr": "*fp32", "parts": "i32", "size": "i32"}
    return (
        _case(False, "bf16", "silu", False, 16, (arch,)),
        _case(True, "bf16", "silu", False, 16, (arch,)),
        _case(True, "fp16", "gelu_tanh", True, 32, (arch,)),
        AotCase(_sums_kernel, sums, {"BLOCK": SUM_BLOCK}, note="r 16", unaligned=("parts",)),
    )
