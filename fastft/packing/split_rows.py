"""Context parallelism: each process has a part of every row.

Attention then is causal over the whole row, and over nothing else: torch sends keys and values from process to process
without a mask, and Accelerate takes away what mask the model makes of its part of the row. So a part is no padded batch
and no packed row (its positions jump where two pieces of the row meet, and no document begins there), and goes to
stock's attention as it is. A mask that would be lost is refused: within documents, or within a window."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastft.compat.accelerate_private import drops_mask
from fastft.compat.sharding_private import context_parallel_mesh
from fastft.errors import DroppedMaskError

_DOCUMENTS = ("cu_seq_lens_q", "seq_idx")


def is_split(attentions: Iterable[nn.Module]) -> bool:
    """Are rows split over processes now, or does a hook take the mask of one of these attentions away?"""
    return context_parallel_mesh() is not None or any(
        drops_mask(h) for m in attentions for h in (m._forward_pre_hooks or {}).values()
    )


def refuse_lost_masks(module: Any, given: dict[str, Any]) -> None:
    """module: calls the layers, with these arguments. Every process comes here alike.

    Raises:
        DroppedMaskError: a layer attends within a window, or a row holds documents.
    """
    config = module.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention"] if getattr(config, "sliding_window", None) else []
    if windows := sorted({k for k in kinds if k != "full_attention"}):
        raise DroppedMaskError(
            f"context parallelism attends over whole rows and has no mask, and layers of this model are "
            f"{', '.join(windows)}: train it without (cp_size=1)"
        )
    if given.get("attention_mask") is None and _has_documents(given):
        raise DroppedMaskError(
            "context parallelism has no mask, and the documents of a packed row would see each other (position ids "
            "begin anew within a row): set packing=False and padding_free=False, or train without (cp_size=1)"
        )


def _has_documents(given: dict[str, Any]) -> bool:
    """As transformers tells it: by position ids [B, S]. In the whole row no position comes twice but in another
    document."""
    if any(given.get(n) is not None for n in _DOCUMENTS):
        return True
    positions, mesh = given.get("position_ids"), context_parallel_mesh()
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2:
        return False
    parts = [positions.contiguous()]
    if mesh is not None:
        parts = [torch.empty_like(parts[0]) for _ in range(mesh.size())]
        dist.all_gather(parts, positions.contiguous(), group=mesh.get_group())
    whole = torch.cat(parts, 1).sort(1).values
    return bool((whole[:, 1:] == whole[:, :-1]).any())
