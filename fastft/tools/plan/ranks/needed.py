"""How many GPUs a way to train needs, and what its collectives send."""

from __future__ import annotations

import math
from dataclasses import replace

from fastft.tools.plan.gpus import MOST_GPUS
from fastft.tools.plan.predict import PlannedModel


def sent(moved: dict[str, int], count: int, batches: int) -> dict[str, int]:
    """Bytes that each of `count` ranks sends in a step of so many accumulated batches, in rings. moved: bytes of whole
    tensors that are gathered or summed."""
    once = (count - 1) / count
    return {k: round(v * batches * once * (2 if k == "all-reduce" else 1)) for k, v in moved.items()}


def gpus_needed(
    subject: PlannedModel, layers: tuple[int, int], rows: int, tokens: int, offloaded: int, room: int
) -> int | None:
    """The fewest ranks, each with `rows` of its own, on which a step takes no more than `room` bytes of each GPU; None
    where no number of them is enough. Of a rank's memory in each phase one part is divided among the ranks, and one is
    not: two counts of ranks say how much."""
    ranks = subject.setting.ranks
    assert ranks is not None
    of = lambda count: subject.on(None if count == 1 else replace(ranks, count=count))
    if of(1).peak(layers, rows, tokens, offloaded).total <= room:
        return 1
    few, many = (of(n).peaks(layers, rows, tokens, offloaded) for n in (ranks.count, 2 * ranks.count))
    most = 2
    for a, b in zip(few, many):
        divided = max(0, 2 * ranks.count * (a.total - b.total))  # the whole of what is divided
        left = room - (a.total - divided / ranks.count)
        if left <= 0:
            return None
        most = max(most, math.ceil(divided / left))
    return most if most <= MOST_GPUS else None
