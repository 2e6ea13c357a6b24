"""How many layers must be recomputed for a step to fit.

Layers are kept from the last backwards: their activations are the first that the backward frees, so that the
recomputation of the earlier ones finds room. With the first n of L layers recomputed a step holds at once

    max(sum c_i (i < n) + sum k_i (i >= n),   sum c_i (i < n) + k_(n-1))        k: bytes a kept layer holds, c: a
                                              checkpoint's

and the smallest n that fits beside `reserve` is chosen. If not even n = L does, the first m checkpoints go to the host,
as many as must. Two of them are on the device at a time on their way back:

    max(sum c_i (i >= m) + k_(L-1) if m < L,   c_(m-2) + c_(m-1) + k_(m-1))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Of the layers in order: the first `offloaded` are recomputed from the host, those up to `recomputed` from the
    device, and the rest are kept. fits: whether the step is expected to."""

    recomputed: int
    offloaded: int = 0
    fits: bool = True


def choose(kept: Sequence[int], checkpoint: Sequence[int], available: int, reserve: int = 0) -> Split:
    """Choose how many layers are recomputed, and how many of these from the host. kept, checkpoint: bytes for each
    layer in the order of the forward; available: bytes free before the first of them; reserve: bytes that the rest of
    the step needs (head, gradients, temporary buffers)."""
    n_layers, room = len(kept), available - reserve
    held, later = 0, sum(kept)
    for n in range(n_layers + 1):
        if n:
            held += checkpoint[n - 1]
            later -= kept[n - 1]
        if held + max(later, kept[n - 1] if n else 0) <= room:
            return Split(n)
    for m in range(1, n_layers + 1):
        held -= checkpoint[m - 1]
        from_device = held + kept[-1] if m < n_layers else 0
        from_host = sum(checkpoint[max(0, m - 2) : m]) + kept[m - 1]
        if max(from_device, from_host) <= room:
            return Split(n_layers, m)
    return Split(n_layers, n_layers, fits=False)
