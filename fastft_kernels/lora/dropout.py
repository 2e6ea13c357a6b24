"""Dropout that draws from torch's own stream, and draws the same mask again instead of keeping it.

    y = x * mask * k,   mask ~ Bernoulli(1 - p),   k = 1 / (1 - p)            dx = dy * mask * k

`draw_mask` consumes the default generator exactly as torch.nn.functional.dropout does on an input of the same shape,
dtype and device, so a run with it sees the masks of a stock run. Before the draw, `capture` notes where the stream
stands: a copy of the generator on a CPU (5 KB whatever the tensor's size), two integers on CUDA, read without
synchronising. `draw_mask` with that state repeats the mask from there and leaves the default stream as it was. Where a
stream cannot be rewound (under torch.compile, inside a CUDA graph capture, on other devices) `capture` answers None,
and the caller keeps the mask: one byte an element.

The factor k belongs in the product that consumes x * mask: that tensor is then exact in any dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

State = torch.Generator | tuple[int, int]


def capture(device: torch.device) -> State | None:
    """Where the default generator of `device` stands now; None if a draw there could not be repeated."""
    if torch.compiler.is_compiling():
        return None
    if device.type == "cpu":
        return torch.default_generator.clone_state()
    if device.type == "cuda" and torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        generator = _cuda_generator(device)
        return generator.initial_seed(), generator.get_offset()
    return None


def factor(p: float) -> float:
    """k = 1 / (1 - p); 0 where everything is dropped."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def draw_mask(like: torch.Tensor, dtype: torch.dtype, p: float, state: State | None = None) -> torch.Tensor:
    """The mask [bool, laid out like `like`] that torch.nn.functional.dropout(like.to(dtype), p) would use.

    state None draws from the default generator; a state from `capture` repeats the draw that followed it. The values of
    `like` are not read."""
    if p >= 1.0 or like.numel() == 0:  # torch draws nothing here
        return torch.zeros_like(like, dtype=torch.bool)
    if (
        like.is_cuda or like.is_xpu
    ):  # which element gets which random number depends on shape and dtype: ask torch's own kernel
        with _rewound(like.device, state):
            return torch.native_dropout(torch.empty_like(like, dtype=dtype), p, True)[1]
    generator = state.clone_state() if isinstance(state, torch.Generator) else None
    # on a CPU a mask of booleans consumes what a mask in any other dtype would
    mask = torch.empty_like(like, dtype=torch.bool if like.device.type == "cpu" else dtype)
    return mask.bernoulli_(1.0 - p, generator=generator).bool()


def _cuda_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


@contextlib.contextmanager
def _rewound(device: torch.device, state: State | None) -> Iterator[None]:
    """The CUDA generator at an earlier (seed, offset); afterwards where it was."""
    if state is None:
        yield
        return
    generator = _cuda_generator(device)
    now = generator.initial_seed(), generator.get_offset()
    _seek(generator, state)
    try:
        yield
    finally:
        _seek(generator, now)


def _seek(generator: torch.Generator, state: tuple[int, int]) -> None:
    if generator.initial_seed() != state[0]:
        generator.manual_seed(state[0])
    generator.set_offset(state[1])
