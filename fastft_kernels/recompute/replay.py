"""Recomputation that leaves out what no gradient needs.

A checkpointed layer is run again in the backward for the tensors that its functions saved, and (non-reentrant
checkpointing) only until the last of them is there again. A function that saves before it computes its output spares
that output where it is the last:
a decoder layer's down projection, a third of a feed-forward's products. `again()` surrounds such a second run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _ReplayState(threading.local):
    """This thread's (a backward runs in one of its own). depth: how many `again()` it is inside; functions then save
    first and compute their output last. first: how many `first_run()`."""

    depth = 0
    first = 0


REPLAY = _ReplayState()


@contextlib.contextmanager
def first_run() -> Iterator[None]:
    """Surrounds the first run of a reentrant checkpoint, which is without gradients and is repeated with them."""
    REPLAY.first += 1
    try:
        yield
    finally:
        REPLAY.first -= 1


@contextlib.contextmanager
def again() -> Iterator[None]:
    """Surrounds the second run of a checkpointed function. Results and saved tensors are those of the first, bit for
    bit."""
    REPLAY.depth += 1
    try:
        yield
    finally:
        REPLAY.depth -= 1
