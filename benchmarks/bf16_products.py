"""Products of bfloat16 matrices on a CPU without bfloat16 units, as a tensor core computes them: operands as they are,
sums in float32, one rounding at the end.

torch's own kernels for such CPUs do the same, ten to a hundred times slower than float32's. Here the operands are
widened (exactly), multiplied in float32 and rounded once. The replaced operators are torch's for the whole process, so
this is for a benchmark that owns its process, and for nothing that is timed."""

from __future__ import annotations

import warnings

import torch

_KEPT: list[torch.library.Library] = []


def through_float32() -> None:
    """From here on `aten::mm`, `bmm` and `addmm` of bfloat16 on the CPU go through float32. Other dtypes are computed
    as before."""
    if _KEPT:
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously")
        library.impl("mm", _mm, "CPU")
        library.impl("bmm", _bmm, "CPU")
        library.impl("addmm", _addmm, "CPU")
    _KEPT.append(library)


def _wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.float() if t.dtype == torch.bfloat16 else t for t in tensors]


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x, y = _wide(a, b)
    # the variant with `out` is another operator, which is not replaced
    return torch.mm(x, y, out=x.new_empty(x.shape[0], y.shape[1])).to(a.dtype)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x, y = _wide(a, b)
    return torch.bmm(x, y, out=x.new_empty(x.shape[0], x.shape[1], y.shape[2])).to(a.dtype)


def _addmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta=1, alpha=1) -> torch.Tensor:
    z, x, y = _wide(c, a, b)
    return torch.addmm(z, x, y, beta=beta, alpha=alpha, out=x.new_empty(x.shape[0], y.shape[1])).to(a.dtype)
