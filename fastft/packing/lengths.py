"""Modules that make a table of positions, and whether the table depends on how long the row is (dynamic NTK, longrope).

An unpadded batch may end at an earlier position than the padded one: there such a module would make another table.
Found by asking a copy for the same few positions, beside ever larger ones."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator

import torch
from torch import nn

from fastft.packing.batch import Unpadded
from fastft.packing.layer_proof import bare
from fastft.proving.clone import clone
from fastft.proving.prove import undisturbed
from fastft.swapping.swap import stock_class

ENDS = tuple(2**n for n in range(3, 25))  # last positions that are tried


def _makers(owner: nn.Module) -> Iterator[nn.Module]:
    """Modules without weights that are given positions."""
    for module in owner.modules():
        if (
            module is not owner
            and next(module.parameters(), None) is None
            and "position_ids" in inspect.signature(stock_class(module).forward).parameters
        ):
            yield module


class Lengths:
    """changing: for each owner seen, the modules whose table depends on the last position."""

    def __init__(self):
        self.changing: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]] = weakref.WeakKeyDictionary()

    def obstacle(self, owner: nn.Module, rows: Unpadded, positions: torch.Tensor | None) -> str:
        if owner not in self.changing:
            makers = list(_makers(owner))
            self.changing[owner] = [weakref.ref(m) for m in makers if any(_differ(m, owner.config, 7, n) for n in ENDS)]
        found = [m for r in self.changing[owner] if (m := r()) is not None]
        if not found:
            return ""
        padded, real = rows.length - 1, rows.last
        if positions is not None:
            padded, real = torch.stack([positions.max(), rows.gather(positions).max()]).tolist()
        if padded != real and any(_differ(m, owner.config, real, padded) for m in found):
            return "its table of positions depends on the length of the padded row"
        return ""


def _differ(module: nn.Module, config, a: int, b: int) -> bool:
    """Are the tables for rows that end at position a and at b, where both have them, not the same bits? (Also where
    that cannot be told.)"""
    text = config.get_text_config()
    kinds = (
        sorted(set(getattr(text, "layer_types", None) or []))
        if "layer_type" in inspect.signature(stock_class(module).forward).parameters
        else [None]
    )
    device = next((b.device for b in module.buffers()), torch.device("cpu"))
    few = sorted({p for p in (0, 1, 3, 7, a // 2, a) if p <= min(a, b)})
    with undisturbed(), torch.no_grad():
        for kind in kinds or [None]:
            tables = []
            for end in (a, b):
                ids = torch.tensor([[*few, end]], device=device)
                try:
                    copy = bare(clone(module))
                    out = copy(
                        torch.zeros(1, len(few) + 1, 8, device=device),
                        position_ids=ids,
                        **({} if kind is None else {"layer_type": kind}),
                    )
                except Exception:
                    return True
                tables.append(
                    [
                        t[:, : len(few)]
                        for t in (out if isinstance(out, tuple) else (out,))
                        if isinstance(t, torch.Tensor)
                    ]
                )
            if len(tables[0]) != len(tables[1]) or not all(torch.equal(x, y) for x, y in zip(*tables)):
                return True
    return False
