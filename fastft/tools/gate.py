"""Losses and gradients of a whole model, or of a whole layer, against a high-precision run: the accuracy check before
anything is timed.

Through many products rounding errors add up like a random walk, and one stock run is one sample of it. So results are
judged per kind, over several batches where there are some: every tensor is divided by the largest true value in it; all
outputs are one vector to the judge, all gradients another. A defect in the smallest adapter shows; one lucky rounding
of stock does not fail anybody."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from fastft_kernels.numerics import Verdict, compare

_FAILED = Verdict(False, "", float("inf"), float("inf"), float("inf"), float("inf"), float("inf"), "nothing to compare")
Results = Mapping[str, torch.Tensor]  # name, or "draw:name" with the number of the batch first


def gate(
    ours: Results, reference: Results, eager: Results, is_output: Callable[[str], bool] = lambda name: name == "loss"
) -> Verdict:
    """Judge a model's results against a reference, as far off as stock's may be.

    Args:
        ours, eager: results of the candidate and of stock, in the training dtype.
        reference: the same tensors of a run in a higher precision; the same names as in the other two.
        is_output: tells outputs from gradients by a tensor's name.

    Returns:
        The worse of two verdicts, of all outputs and of all gradients. One that fails names the tensor that is
        furthest off; other names than the reference's fail."""
    if not set(ours) == set(reference) == set(eager):
        odd = sorted(set(ours) ^ set(reference) | set(eager) ^ set(reference))
        return Verdict(
            False,
            "",
            float("inf"),
            0.0,
            float("inf"),
            0.0,
            0.0,
            f"gradients of other parameters than stock's: {odd[:4]}",
        )
    verdicts = []
    for kind in ("outputs", "gradients"):
        keys = [k for k in reference if is_output(_name(k)) == (kind == "outputs")]
        if keys:
            scale = _scales(reference, keys)
            flat = lambda r, keys=keys, scale=scale: torch.cat(
                [(r[k].to(reference[k].device).double() / scale[_name(k)]).reshape(-1) for k in keys]
            )
            verdict = compare(flat(ours).float(), flat(reference), flat(eager).float(), kind)
            if not verdict:
                off = {
                    k: float((ours[k].to(reference[k].device).double() - reference[k]).abs().max()) / scale[_name(k)]
                    if reference[k].numel()
                    else 0.0
                    for k in keys
                }
                verdict = replace(verdict, reason=f"{verdict.reason} worst: {max(off, key=lambda k: off[k])}".strip())
            verdicts.append(verdict)
    return min(verdicts, key=lambda v: (v.ok, -v.error)) if verdicts else _FAILED


def _name(key: str) -> str:
    draw, colon, name = key.partition(":")
    return name if colon and draw.isdecimal() else key


def _scales(reference: Results, keys: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for k in keys:
        largest = float(reference[k].abs().max()) if reference[k].numel() else 0.0
        found[_name(k)] = max(found.get(_name(k), 0.0), largest)
    return {k: v or 1.0 for k, v in found.items()}
