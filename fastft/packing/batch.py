"""One batch as a row of documents: what a packed row says of itself by its positions, and what a padded batch becomes
without its padding.

Each question reads one small tensor on the host, once per batch; stock's own mask asks as often.

Under context parallelism each process has a part of every row. Attention then is causal over the whole row, and over
nothing else: torch sends keys and values from process to process without a mask, and Accelerate takes away what mask
the model makes of its part of the row. So a part is no padded batch and no packed row (its positions jump where two
pieces of the row meet, and no document begins there), and goes to stock's attention as it is. A mask that would be lost
is refused: within documents, or within a window.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastft.compat.accelerate_private import drops_mask
from fastft.compat.sharding_private import context_parallel_mesh
from fastft.errors import DroppedMaskError
from fastft.packing.documents import DocumentMask, Documents

_DOCUMENTS = ("cu_seq_lens_q", "seq_idx")  # arguments that say where documents are


def packed(positions: torch.Tensor) -> Documents | None:
    """positions [1, T]: a document begins wherever they do not go up by one, as in transformers. None for a single
    document."""
    starts = ((positions[0, 1:] - positions[0, :-1]) != 1).nonzero()[:, 0].tolist()
    if not starts:
        return None
    at = [0, *(s + 1 for s in starts), positions.shape[1]]
    return Documents(tuple(b - a for a, b in itertools.pairwise(at)), positions.device)


@dataclass(frozen=True)
class Unpadded:
    """rows, length: of the padded batch. last: the last real position of any row. index [T]: where each real token
    stands in it, shortest document first. total: rows x length."""

    documents: Documents
    index: torch.Tensor
    rows: int
    length: int
    last: int

    @functools.cached_property
    def padding(self) -> torch.Tensor:
        """[B, S] bool."""
        flat = torch.ones(self.rows * self.length, dtype=torch.bool, device=self.index.device)
        return flat.index_fill(0, self.index, False).unflatten(0, (self.rows, self.length))

    def gather(self, t: torch.Tensor) -> torch.Tensor:
        """[B, S, ...] -> [1, T, ...]; one row serves all."""
        t = t.expand(self.rows, *t.shape[1:])
        return t.flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def pad(self, t: torch.Tensor) -> torch.Tensor:
        """[1, T, ...] -> [B, S, ...], zeros at the padding."""
        empty = t.new_zeros(self.rows * self.length, *t.shape[2:])
        return empty.index_copy(0, self.index, t[0]).unflatten(0, (self.rows, self.length))

    def arguments(self, given: dict) -> dict:
        """The keyword arguments of the padded forward, for the row of documents. Positions are those that stock would
        use."""
        new = {**given, "attention_mask": DocumentMask.of(self.documents)}
        for name in ("input_ids", "inputs_embeds", "position_ids"):
            if given.get(name) is not None:
                new[name] = self.gather(given[name])
        if given.get("position_ids") is None:
            new["position_ids"] = self.gather(torch.arange(self.length, device=self.index.device)[None])
        return new


@dataclass(frozen=True)
class Labels:
    """What the loss will look at: targets [B, S]; is_shifted: the hidden state at s predicts targets[s], not targets[s
    + 1]."""

    targets: torch.Tensor | None = None
    is_shifted: bool = False

    def look_at(self, padding: torch.Tensor) -> torch.Tensor:
        """0-d bool: does a label at the padding [B, S] count, or one that is predicted from there?"""
        t = self.targets
        if t is None or t.shape != padding.shape:
            return torch.zeros((), dtype=torch.bool, device=padding.device)
        used = t.to(padding.device) != -100
        at = (used & padding).any()
        return at if self.is_shifted else at | (used[:, 1:] & padding[:, :-1]).any()


def unpadded(mask: torch.Tensor, labels: Labels, ids: torch.Tensor | None, pad_id: int | None) -> Unpadded | str | None:
    """mask [B, S] of ones and zeros. None where nothing is padded; a string: it is, and why it must stay."""
    rows, length = mask.shape
    real = mask != 0
    numbers = torch.arange(length, device=mask.device)
    first = torch.where(real, numbers, length).amin(1)
    last = torch.where(real, numbers, -1).amax(1)
    count = real.sum(1)
    binary = ((mask == 0) | (mask == 1)).all()
    by_id = labels.targets is None or labels.targets.shape != mask.shape  # a head that finds the last token by its id
    other = (
        ((ids != pad_id) & ~real).any()
        if by_id and ids is not None and pad_id is not None and pad_id >= 0
        else ~binary & binary
    )
    # a row without a token but the padding's has none to find
    if by_id and ids is not None and pad_id is not None and pad_id >= 0:
        other = other | ~(real & (ids != pad_id)).any(1).all()
    flags = torch.stack([binary, labels.look_at(~real), other]).long()
    host = torch.cat([flags, first, last, count]).tolist()
    is_binary, looks, others = host[:3]
    first, last, count = host[3 : 3 + rows], host[3 + rows : 3 + 2 * rows], host[3 + 2 * rows :]
    if is_binary and sum(count) == rows * length:
        return None
    if not is_binary:
        return "the attention mask holds more than zeros and ones"
    if any(n and b - a + 1 != n for a, b, n in zip(first, last, count)):
        return "a row's tokens are not contiguous in the attention mask"
    if looks:
        return "a label asks for the prediction of a padded position"
    if others:
        return "a head that looks for the last token by the padding's id would look at the padding"
    by_length = sorted((n, i) for i, n in enumerate(count) if n)
    if not by_length:
        return "every position is padded"
    index = torch.cat([torch.arange(first[i], first[i] + n) + i * length for n, i in by_length])
    documents = Documents(tuple(n for n, _ in by_length), mask.device)
    return Unpadded(documents, index.to(mask.device, non_blocking=True), rows, length, max(last))


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
