"""Dropout that draws from torch's own stream, and draws the same mask again instead of keeping it.

    y = x * mask / (1 - p),   mask ~ Bernoulli(1 - p)            dx = dy * mask / (1 - p)

`draw` consumes the default generator exactly as torch.nn.functional.dropout does on an input of the same shape, dtype and device, so
a run with it sees the masks of a stock run. Before the draw, `capture` notes where the stream stands: a copy of the generator on a CPU
(5 KB whatever the tensor's size), two integers on CUDA, read without synchronising. `draw(..., state)` then repeats the mask from
there and leaves the default stream as it was. Where a stream cannot be rewound (under torch.compile, inside a CUDA graph capture,
on other devices) `capture` answers None, and the caller keeps the mask: one byte an element.
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


def draw(x: torch.Tensor, p: float, state: State | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(x * mask / (1 - p), mask [bool]), both shaped like x; not differentiable, x is not modified.

    state None draws from the default generator, as torch.nn.functional.dropout(x, p, training=True) would; a state from `capture`
    repeats the draw that followed it.
    """
    if p >= 1.0 or x.numel() == 0:  # torch draws nothing here
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    if x.is_cuda or x.is_xpu:
        with _rewound(x.device, state):
            return torch.native_dropout(x, p, True)
    generator = state.clone_state() if isinstance(state, torch.Generator) else None
    # on a CPU a mask of booleans consumes what a mask in x's dtype would, which is what torch draws
    mask = torch.empty_like(x, dtype=torch.bool if x.device.type == "cpu" else x.dtype).bernoulli_(1.0 - p, generator=generator)
    mask = mask.bool()
    return masked(x, mask, p), mask


def masked(x: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """x * mask / (1 - p) in x's dtype, for a mask from `draw`."""
    if p >= 1.0:
        return torch.zeros_like(x)
    return (x * mask).mul_(1.0 / (1.0 - p))


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
