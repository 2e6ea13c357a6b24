"""How large a proof's inputs are, so that every tiled kernel runs at least two tiles in each tiled direction and a
partial last one, with the launch settings of a training step. Where no Triton kernel runs (a CPU), there are no tiles
and a few rows do."""

from __future__ import annotations

import torch

from fastft_kernels.lm_head import tiles as head_tiles
from fastft_kernels.runtime.dispatch import use_triton
from fastft_kernels.runtime.rows import BWD_TILES, FWD_TILES, PARTIALS, row_launch

FEW = 9  # rows where there are no tiles


def kernels_run(device: torch.device) -> bool:
    """Do Triton kernels run on `device`?"""
    return use_triton(torch.empty(0, device=device))


def norm_rows(width: int, device: torch.device) -> int:
    """Rows of `width` columns: more than one block of every launch, and more than the programs that share the sum over
    rows."""
    if not kernels_run(device):
        return 2 * FEW
    forward, backward = row_launch(width, FWD_TILES), row_launch(width, BWD_TILES)
    return max(2 * forward.block_m, PARTIALS * backward.block_m) + backward.block_m // 2 + 1


def elementwise_rows(width: int, device: torch.device) -> int:
    """Rows of `width` columns: more than two blocks of 1024 elements, along rows and along columns."""
    return 2 * -(-1024 // max(width, 1)) + 3 if kernels_run(device) else 5


def head_sizes(width: int, vocab: int, device: torch.device) -> tuple[int, int]:
    """(width, vocabulary) of the head that is proven: as the model's up to where its tiles repeat. The vocabulary makes
    a first tile and a partial second one; the width, on a device with kernels, more than one block of those that
    rescale and finish the row Jacobian."""
    vocab = min(vocab, head_tiles.VOCAB_TILE + 300)
    if not kernels_run(device):
        return min(width, 64), vocab
    if width <= 2048:
        return width, vocab
    return (2048 if width <= 4096 else 4096) + 256, vocab
