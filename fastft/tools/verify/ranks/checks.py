"""Comparisons, each a line of the table: by the judge, and between processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from fastft.tools.gate import gate
from fastft.tools.verify.ranks.job import Line
from fastft.tools.verify.ranks.training import Results


def judged(name: str, ours: Results, truth: Results, runs: Sequence[Results], kind: str) -> Line:
    """By the judge, with the furthest off of stock's runs for each tensor. kind: "loss", "gradients" or "weights"."""
    wanted = [k for k in truth if kind == "weights" or k.endswith(":loss") == (kind == "loss")]
    mine = {k: v for k, v in ours.items() if kind == "weights" or k.endswith(":loss") == (kind == "loss")}
    true = {k: truth[k] for k in wanted}
    far = lambda run, k: float((run[k].to(true[k].device).double() - true[k]).abs().max())
    eager = {k: max((r[k] for r in runs), key=lambda t, k=k: far({k: t}, k)) for k in wanted}
    shapes = [k for k in wanted if k in mine and mine[k].shape != true[k].shape]
    if shapes:
        return Line(name, False, f"{shapes[0]} is {list(mine[shapes[0]].shape)}, not {list(true[shapes[0]].shape)}")
    verdict = gate(mine, true, eager, lambda _: kind == "loss")
    detail = "" if verdict else _plain(f"{verdict.reason}")
    return Line(name, bool(verdict), detail, verdict.error, verdict.eager_error)


def _plain(reason: str) -> str:
    """ "worst: 1:NAME" as a reader takes it."""
    head, worst, key = reason.rpartition("worst: ")
    if not worst:
        return reason
    step, colon, name = key.partition(":")
    return f"{head}furthest off: {name} in step {int(step) + 1}" if colon else f"{head}furthest off: {key}"


def equal_on_all(name: str, tensors: Results, where: str) -> Line:
    """Have all processes the same bits of every tensor? A process that differs is named."""
    everybody = exchanged({n: digest(t) for n, t in tensors.items()})
    for rank, theirs in enumerate(everybody[1:], 1):
        odd = [n for n in everybody[0] if theirs.get(n) != everybody[0][n]]
        if odd or len(theirs) != len(everybody[0]):
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            what = f"{odd[0]}{more}" if odd else "other parameters"
            return Line(name, False, f"rank {rank} {where} other values than rank 0: {what}")
    return Line(name, bool(tensors), f"{len(tensors)} tensors" if tensors else "nothing trains")


def on_all(name: str, odd: str, holds: str) -> Line:
    """odd: what this process finds wrong, empty where nothing is; holds: what holds where no process does."""
    for rank, found in enumerate(exchanged(odd)):
        if found:
            return Line(name, False, f"rank {rank}: {found}")
    return Line(name, True, holds)


def same_swaps(summaries: list[dict[str, Any]]) -> Line:
    """Do all processes run the same modules the fast way?"""
    first = summaries[0]["swapped"]
    shown = ", ".join(f"{kind} {n}" for kind, n in sorted(first.items())) or "none"
    for rank, other in enumerate(summaries[1:], 1):
        if other["swapped"] != first:
            theirs = ", ".join(f"{kind} {n}" for kind, n in sorted(other["swapped"].items())) or "none"
            return Line("swapped modules", False, f"rank 0: {shown}; rank {rank}: {theirs}")
    return Line("swapped modules", True, shown)


def worse(check: Line, also: str) -> Line:
    """The check failed for one more reason, where there is one."""
    return replace(check, ok=False, detail="; ".join(x for x in (also, check.detail) if x)) if also else check


def digest(t: torch.Tensor) -> str:
    """Of shape, dtype and bits."""
    data = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{t.dtype} {tuple(t.shape)} ".encode() + data).hexdigest()


def exchanged(mine: Any) -> list[Any]:
    """What every process has to say, by rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
