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
    ours: Results, truth: Results, eager: Results, is_output: Callable[[str], bool] = lambda name: name == "loss"
) -> Verdict:
    """The worse verdict of outputs and gradients, told apart by their names. The same names in all three; `truth` in a
    precision above theirs. A verdict that fails names the tensor that is furthest off."""
    if not set(ours) == set(truth) == set(eager):
        odd = sorted(set(ours) ^ set(truth) | set(eager) ^ set(truth))
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
        keys = [k for k in truth if is_output(_name(k)) == (kind == "outputs")]
        if keys:
            scale = _scales(truth, keys)
            flat = lambda r, keys=keys, scale=scale: torch.cat(
                [(r[k].to(truth[k].device).double() / scale[_name(k)]).reshape(-1) for k in keys]
            )
            verdict = compare(flat(ours).float(), flat(truth), flat(eager).float(), kind)
            if not verdict:
                off = {
                    k: float((ours[k].to(truth[k].device).double() - truth[k]).abs().max()) / scale[_name(k)]
                    if truth[k].numel()
                    else 0.0
                    for k in keys
                }
                verdict = replace(verdict, reason=f"{verdict.reason} worst: {max(off, key=lambda k: off[k])}".strip())
            verdicts.append(verdict)
    return min(verdicts, key=lambda v: (v.ok, -v.error)) if verdicts else _FAILED


def _name(key: str) -> str:
    draw, colon, name = key.partition(":")
    return name if colon and draw.isdecimal() else key


def _scales(truth: Results, keys: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for k in keys:
        found[_name(k)] = max(found.get(_name(k), 0.0), float(truth[k].abs().max()) if truth[k].numel() else 0.0)
    return {k: v or 1.0 for k, v in found.items()}
