"""A row of documents, and the mask that stands for it.

A packed row [1, T] holds documents one after another; a token attends to its own document alone. `Documents` says where
they lie. `DocumentMask` travels in the place of the [1, 1, T, T] mask through a model's forward to its attention, in no
memory: transformers hands a mask of four dimensions on as it is. It has a mask's shape and can be moved; whoever wants
to read it is no attention that knows documents, and gets a `MaskReadError`, which is how a proof finds out that a model
does more with its mask."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field

import torch

from fastft.compat.torch_private import subclass_of, without_overrides

_ATTRIBUTES = frozenset(
    {
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "requires_grad",
        "is_cuda",
        "is_meta",
        "is_leaf",
        "is_sparse",
        "is_quantized",
    }
)
_QUESTIONS = frozenset(
    {
        "size",
        "dim",
        "ndimension",
        "numel",
        "stride",
        "element_size",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "data_ptr",
        "storage_offset",
        "__hash__",
        "__len__",
        "untyped_storage",
        "is_inference",
    }
)
_MOVES = frozenset({"to", "cuda", "cpu", "detach", "contiguous", "__getitem__", "view_as", "expand"})


class MaskReadError(RuntimeError):
    """Something other than an attention on the attention interface reads the mask."""


@dataclass(frozen=True)
class Documents:
    """lengths: tokens of each document, in the order of the row (on the host: no sync later). device: where the row is.
    kept: what a kernel computed once for all layers. used: the kernels that attended, and why no faster ones (one dict
    for all rows of a model)."""

    lengths: tuple[int, ...]
    device: torch.device
    kept: dict = field(default_factory=dict, compare=False, repr=False)
    used: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @functools.cached_property
    def offsets(self) -> torch.Tensor:
        """[documents + 1] int32: where each document begins, and the end."""
        ends = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.device, non_blocking=True)

    @functools.cached_property
    def document(self) -> torch.Tensor:
        """[T] int32: the document of each token."""
        numbers = torch.arange(len(self.lengths), dtype=torch.int32)
        return torch.repeat_interleave(numbers, torch.tensor(self.lengths)).to(self.device, non_blocking=True)

    @functools.cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(length, documents of that length), shortest first."""
        count: dict[int, int] = defaultdict(int)
        for n in self.lengths:
            count[n] += 1
        return tuple(sorted(count.items()))

    @functools.cached_property
    def order(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The tokens' order in which documents are sorted by length, and its inverse ([T] each); None where the row is
        sorted."""
        if list(self.lengths) == sorted(self.lengths):
            return None
        starts, at = [], 0
        for n in self.lengths:
            starts.append(at)
            at += n
        by_length = sorted(range(len(starts)), key=lambda i: self.lengths[i])
        there = torch.cat([torch.arange(starts[i], starts[i] + self.lengths[i]) for i in by_length])
        back = torch.empty_like(there)
        back[there] = torch.arange(at)
        return there.to(self.device, non_blocking=True), back.to(self.device, non_blocking=True)


class DocumentMask(torch.Tensor):
    """Bool, [1, 1, T, T], one element in memory."""

    documents: Documents

    @staticmethod
    def of(documents: Documents) -> DocumentMask:
        n = documents.tokens
        mask = subclass_of(DocumentMask, torch.ones((), dtype=torch.bool, device=documents.device).expand(1, 1, n, n))
        mask.documents = documents
        return mask

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        with without_overrides():
            if (name == "__get__" and owner in _ATTRIBUTES) or name in _QUESTIONS:
                return func(*args, **(kwargs or {}))
            mask = args[0] if args else None
            if name in _MOVES and isinstance(mask, DocumentMask):
                moved = func(*args, **(kwargs or {}))
                if moved.shape == mask.shape and moved.dtype == torch.bool:
                    return (
                        mask
                        if moved.device == mask.device
                        else DocumentMask.of(Documents(mask.documents.lengths, moved.device, used=mask.documents.used))
                    )
        raise MaskReadError(
            f"a packed row's mask is read by {owner or name or func}: packing needs attention on transformers' "
            "attention interface"
        )

    def __deepcopy__(self, memo) -> DocumentMask:
        return self

    def __repr__(self, *, tensor_contents=None) -> str:
        return (
            f"DocumentMask({len(self.documents.lengths)} documents, {self.documents.tokens} tokens, "
            f"{self.documents.device})"
        )
