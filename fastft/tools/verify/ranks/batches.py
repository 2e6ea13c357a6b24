"""The rows of a step, and those of each process: of different lengths, padded, so that the processes have different
numbers of tokens and a mean of their means would not be the mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Batch = dict[str, torch.Tensor]
IGNORED = -100  # the label that no loss counts


def draw(base: Any, rows: int, seq: int, step: int) -> Batch:
    """The whole batch of a step: random tokens [rows, seq], the first row as long as that, each further one shorter,
    padded on the right. The same on every process."""
    config = base.config.get_text_config()
    ids = torch.randint(0, config.vocab_size, (rows, seq), generator=torch.Generator().manual_seed(1 + step))
    lengths = torch.tensor([max(2, seq - i * seq // (2 * rows)) for i in range(rows)])
    mask = (torch.arange(seq) < lengths[:, None]).long()
    pad = config.pad_token_id
    ids = ids.masked_fill(mask == 0, pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else 0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}
    device = device_of(base)
    return {k: v.to(device) for k, v in batch.items()}


def part(batch: Batch, index: int, of: int) -> Batch:
    """The rows of one process."""
    rows = len(batch["input_ids"]) // of
    return {k: v[index * rows : (index + 1) * rows] for k, v in batch.items()}


def tokens_of(batch: Batch) -> int:
    """As a trainer counts them for `num_items_in_batch`."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def device_of(model: nn.Module) -> torch.device:
    """That of the first parameter."""
    return next(model.parameters()).device
