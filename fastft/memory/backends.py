"""Which kernel attends within documents: chosen from device, dtype and form, and proven here on this device before it is used."""

from __future__ import annotations

import torch

from fastft.memory.attention import Form, by_document
from fastft.memory.segments import Segments


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, form: Form) -> torch.Tensor:
    """[1, T, H, Dv], contiguous."""
    return by_document(q, k, v, segments, form)
