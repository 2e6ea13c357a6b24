"""The one judge of numerical correctness, for tests, for the proofs at patch time, for `fastft verify` and for
benchmark gates.

    compare(ours, reference, eager):  reference in float64, eager in the same dtype as ours, e(.) = |. - reference|
    pass  <=>  max e(ours) <= 2 max e(eager) + ulp   and   rms e(ours) <= 2 rms e(eager) + ulp / sqrt(n)

where ulp = eps(dtype of ours) * max|reference| is one unit in the last place of the largest true value, and n the
number of elements.
No fixed tolerance: a bfloat16 tolerance of 2e-2 passes a 1% scaling error. Infinities must match in place and sign; NaN
never passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

FACTOR = 2.0


@dataclass(frozen=True)
class Verdict:
    """Outcome of `compare`. `error` and `eager_error` are max errors relative to max|reference| (dimensionless)."""

    ok: bool
    name: str
    error: float
    eager_error: float
    rms: float
    eager_rms: float
    ulp: float
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        where = f"{self.name}: " if self.name else ""
        return (
            f"{where}{'pass' if self.ok else 'FAIL'} max {self.error:.3e} (eager {self.eager_error:.3e}) "
            f"rms {self.rms:.3e} (eager {self.eager_rms:.3e}) ulp "
            f"{self.ulp:.1e}{' ' + self.reason if self.reason else ''}"
        )


def _errors(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|x - reference| in float64, 0 where both are the same infinity."""
    return torch.where(x == reference, 0.0, (x - reference).abs())


def _compare_one(ours: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor, name: str) -> Verdict:
    def fail(reason: str) -> Verdict:
        return Verdict(False, name, math.inf, math.nan, math.inf, math.nan, math.nan, reason)

    if reference.dtype not in (torch.float64, torch.complex128):
        raise TypeError(f"compare: want reference in float64, got {reference.dtype}")
    if ours.shape != reference.shape or eager.shape != reference.shape:
        return fail(
            f"shapes differ: ours {tuple(ours.shape)}, reference {tuple(reference.shape)}, eager {tuple(eager.shape)}"
        )
    if ours.dtype != eager.dtype:
        return fail(f"dtypes differ: ours {ours.dtype}, eager {eager.dtype}")
    eps = torch.finfo(ours.dtype).eps
    if ours.numel() == 0:
        return Verdict(True, name, 0.0, 0.0, 0.0, 0.0, eps)
    t = reference.detach()
    o, e = (x.detach().to(device=t.device, dtype=t.dtype) for x in (ours, eager))
    if bool(torch.isnan(o).any()):
        return fail("ours has NaN")
    finite = torch.isfinite(t)
    if not bool(torch.equal(o[~finite], t[~finite])) or not bool(
        torch.isfinite(o[finite]).all() | (~torch.isfinite(e[finite])).any()
    ):
        return fail("infinities differ")
    scale = float(t[finite].abs().max()) if bool(finite.any()) else 0.0
    eo, ee = _errors(o, t), _errors(e, t)
    ulp = eps * scale if scale else torch.finfo(ours.dtype).tiny
    mo, me = float(eo.max()), float(ee.max())
    ro, re = float(eo.square().mean().sqrt()), float(ee.square().mean().sqrt())
    ok = mo <= FACTOR * me + ulp and ro <= FACTOR * re + ulp / math.sqrt(t.numel())
    unit = scale or 1.0
    return Verdict(ok, name, mo / unit, me / unit, ro / unit, re / unit, eps)


def compare(ours, reference, eager, name: str = "") -> Verdict:
    """Judge `ours` against `reference`, by how far off `eager` is.

    Args:
        ours, eager: tensors of one floating dtype, or sequences or mappings of such tensors, of one structure.
        reference: the same in float64.
        name: stands in front of the verdict's text.

    Returns:
        The verdict; the worst of all where there are several tensors. None passes only beside None.

    Raises:
        TypeError: the reference is not in float64.
    """
    if isinstance(reference, Mapping):
        items = [(str(k), ours.get(k), reference[k], eager.get(k)) for k in reference]
        if set(ours) != set(reference) or set(eager) != set(reference):
            odd = sorted(
                set(map(str, ours)) ^ set(map(str, reference)) | set(map(str, eager)) ^ set(map(str, reference))
            )
            return Verdict(False, name, math.inf, math.nan, math.inf, math.nan, math.nan, f"keys differ: {odd[:5]}")
    elif isinstance(reference, Sequence):
        if not len(ours) == len(reference) == len(eager):
            return Verdict(False, name, math.inf, math.nan, math.inf, math.nan, math.nan, "lengths differ")
        items = [(str(i), o, t, e) for i, (o, t, e) in enumerate(zip(ours, reference, eager))]
    else:
        if ours is None or reference is None or eager is None:
            same = ours is None and reference is None and eager is None
            return Verdict(same, name, 0.0, 0.0, 0.0, 0.0, 0.0, "" if same else "a gradient is missing on one side")
        return _compare_one(ours, reference, eager, name)
    verdicts = [compare(o, t, e, f"{name}.{k}" if name else k) for k, o, t, e in items]
    if not verdicts:
        return Verdict(True, name, 0.0, 0.0, 0.0, 0.0, 0.0)
    return max(
        verdicts,
        key=lambda v: (
            not v.ok,
            v.error if v.ok else v.error / (FACTOR * v.eager_error + v.ulp) if v.ulp else math.inf,
        ),
    )
