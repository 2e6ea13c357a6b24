"""Out of memory, on a device or on the host: never a reason why one module stays stock, as the next attempt may have
the room."""

from __future__ import annotations

import torch

from fastft.errors import FastftError


class PatchMemoryError(FastftError, torch.OutOfMemoryError):
    """No memory for a patch's proofs. The model is as it was before."""


def is_out_of_memory(e: BaseException) -> bool:
    """torch has a class for it on devices; its host allocator raises a RuntimeError."""
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(e, RuntimeError) and "can't allocate memory" in str(e)
    )


def not_for_want_of_memory(e: Exception) -> None:
    """First line of a handler that takes an exception for an answer: raises `e` again where it says nothing about the
    module."""
    if is_out_of_memory(e):
        raise e
