"""What an optimizer keeps for each parameter, and what its step takes, by the name in
`TrainingArguments(optim=...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastft.errors import PlanError

MIN_8BIT, BLOCK, MIN_PAGED = (
    4096,
    256,
    100_000,
)  # bitsandbytes' min_8bit_size, blocksize of a state, least elements of a paged state
TORCH = {"adamw_torch": {"fused": False}, "adamw_torch_fused": {"fused": True}}
BITSANDBYTES = {  # bits of a state, whether it is paged
    "adamw_8bit": (8, False),
    "adamw_bnb_8bit": (8, False),
    "paged_adamw_8bit": (8, True),
    "paged_adamw": (32, True),
    "paged_adamw_32bit": (32, True),
}
NAMES = (*TORCH, *BITSANDBYTES)


def states(model: nn.Module, optim: str, for_cuda: bool) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """(the optimizer's step, its state), on the fake parameters of `model` that train. Raises PlanError for a name that
    is not in NAMES."""
    learning = [p for p in model.parameters() if p.requires_grad]
    if optim in TORCH:
        return _torch(learning, TORCH[optim]["fused"], for_cuda)
    if optim not in BITSANDBYTES:
        raise PlanError(f"optim={optim!r}: want one of {', '.join(NAMES)}")
    bits, paged = BITSANDBYTES[optim]
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    kept: list[torch.Tensor] = []
    for p in learning:
        wide = (
            bits == 32 or p.numel() < MIN_8BIT or id(p) in embeddings
        )  # transformers keeps embeddings' states in 32 bits
        if not (
            paged and for_cuda and p.numel() >= MIN_PAGED
        ):  # a paged state lies in managed memory, which torch does not count
            kept += [torch.empty(p.shape, dtype=torch.float32 if wide else torch.uint8) for _ in range(2)]
        if not wide:
            kept += [torch.empty(-(-p.numel() // BLOCK)) for _ in range(2)]
    if bits == 8 and kept:
        kept += [torch.empty(256) for _ in range(2)]  # the two quantisation maps, shared
    return (lambda: None), kept


def _torch(learning: list[nn.Parameter], fused: bool, for_cuda: bool) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """torch's AdamW itself. Without `fused` it works on lists of all parameters on CUDA, one by one on a CPU."""
    how: Any = {"fused": True} if fused else {"foreach": for_cuda}
    optimizer = torch.optim.AdamW(learning, lr=1e-5, **how)
    for p in learning:
        p.grad = torch.empty_like(p)
    optimizer.step()
    for p in learning:
        p.grad = None
    return optimizer.step, [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
