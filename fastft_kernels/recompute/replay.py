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

import torch

_STATE = threading.local()  # a backward runs in a thread of its own


def recomputing() -> bool:
    """Is this thread inside `again()`? (Functions then save first and compute their output last.)"""
    return not torch.compiler.is_compiling() and getattr(_STATE, "depth", 0) > 0


@contextlib.contextmanager
def again() -> Iterator[None]:
    """Surrounds the second run of a checkpointed function. Results and saved tensors are those of the first, bit for
    bit."""
    _STATE.depth = getattr(_STATE, "depth", 0) + 1
    try:
        yield
    finally:
        _STATE.depth -= 1
