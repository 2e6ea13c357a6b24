"""The gate of every speed: losses and gradients of a whole model, judged against a high-precision run. Red prints no speed.

Through many layers rounding errors add up like a random walk, and one stock run is one sample of it. So whole models are judged per kind of
result, over several batches: every tensor is divided by the largest true value in it; all losses are one vector to the judge, all gradients
another. A defect in the smallest adapter shows; one lucky rounding of stock does not fail anybody.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastft_kernels.numerics import Verdict, compare

Results = Mapping[str, torch.Tensor]  # "draw:loss" and "draw:name of a parameter", the draws' numbers first


def gate(ours: Results, truth: Results, eager: Results) -> Verdict:
    """The worse verdict of losses and gradients. Names must be the same in all three; `truth` in any precision above theirs."""
    if not set(ours) == set(truth) == set(eager):
        odd = sorted(set(ours) ^ set(truth) | set(eager) ^ set(truth))
        return Verdict(False, "", float("inf"), 0.0, float("inf"), 0.0, 0.0, f"gradients of other parameters than stock's: {odd[:4]}")
    verdicts = []
    for kind in ("loss", "gradients"):
        keys = [k for k in truth if (_name(k) == "loss") == (kind == "loss")]
        if keys:
            scale = _scales(truth, keys)
            flat = lambda r, keys=keys, scale=scale: torch.cat([(r[k].double() / scale[_name(k)]).reshape(-1) for k in keys])
            verdicts.append(compare(flat(ours).float(), flat(truth), flat(eager).float(), kind))
    return min(verdicts, key=lambda v: (v.ok, -v.error)) if verdicts else Verdict(False, "", *[float("inf")] * 5, "nothing to compare")


def _name(key: str) -> str:
    return key.split(":", 1)[1]


def _scales(truth: Results, keys: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for k in keys:
        found[_name(k)] = max(found.get(_name(k), 0.0), float(truth[k].abs().max()) if truth[k].numel() else 0.0)
    return {k: v or 1.0 for k, v in found.items()}
