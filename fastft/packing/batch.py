"""One batch as a row of documents: what a packed row says of itself by its positions, and what a padded batch becomes
without its padding.

Each question reads one small tensor on the host, once per batch; stock's own mask asks as often.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

from fastft.packing.documents import DocumentMask, Documents


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
