"""Kept bytes and arithmetic of one layer of experts with adapters at the sizes that people train, on fake tensors that
stand for a GPU's: 4 x 2048 tokens, r=16 on both projections, frozen experts in bfloat16."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastft_kernels.experts.gating import Gating
from fastft_kernels.experts.grouped_experts import grouped_experts
from fastft_kernels.experts.projection import ExpertsAdapter, ExpertsProjection
from fastft_kernels.runtime.dispatch import planned_for_cuda

TOKENS, RANK = 8192, 16
SIZES = {"128 experts, top 8": (128, 2048, 768, 8), "32 experts, top 4": (32, 2880, 2880, 4)}


class Counting(TorchDispatchMode):
    """Multiply-adds of grouped products; shapes of stacks of matrices that an operator made."""

    def __init__(self):
        super().__init__()
        self.products, self.shapes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.fastft.grouped_mm.default:
            self.products += args[0].shape[0] * args[1].shape[1] * args[1].shape[2]
        elif func is torch.ops.fastft.grouped_mm_t.default:
            self.products += args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.dim() == 3 and out.untyped_storage()._cdata not in given:
            self.shapes.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_kept_bytes_and_arithmetic(size):
    experts, hidden, inner, top_k = size
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with FakeTensorMode(), planned_for_cuda():
        make = lambda *shape, learns=True: torch.empty(shape, dtype=torch.bfloat16, requires_grad=learns)
        adapter = lambda a, b: ExpertsAdapter(make(experts, a, RANK), make(experts, RANK, b), 2.0)
        up = ExpertsProjection(make(experts, 2 * inner, hidden, learns=False), adapters=(adapter(hidden, 2 * inner),))
        down = ExpertsProjection(make(experts, hidden, inner, learns=False), adapters=(adapter(inner, hidden),))
        x, weights, index = make(TOKENS, hidden), make(TOKENS, top_k), torch.empty(TOKENS, top_k, dtype=torch.long)
        own = {t.untyped_storage()._cdata for t in (x, weights, index, *up.tensors(), *down.tensors())}
        with Counting() as counted:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                y = grouped_experts(x, index, weights, up, down, Gating())
            y.backward(torch.empty_like(y))
    rows = TOKENS * top_k
    stock = (
        rows * (2 * hidden + 2 * inner + 2 * inner + hidden) * 2
    )  # x by rows, gate and up, act and h, y by rows twice
    assert sum(n for at, n in kept.items() if at not in own) <= stock / 3
    matrices = {(experts, *s) for a, b in ((hidden, 2 * inner), (inner, hidden)) for s in ((a, b), (b, a))}
    assert not counted.shapes & matrices
    factored = 2 * rows * 3 * hidden * inner + 3 * rows * RANK * (hidden + 2 * inner + inner + hidden)
    assert factored <= counted.products <= 1.03 * factored
