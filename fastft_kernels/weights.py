"""A base weight W [out, in], in whatever form it is stored: `.dense(dtype)` is the matrix a product needs.

    Dense     W                                              a tensor; may require a gradient
    NF4       W = code[nibble] * absmax[block]               bitsandbytes 4-bit (NF4 or FP4), absmax possibly quantised itself
    Int8      W = CB * SCB[row] / 127                        bitsandbytes LLM.int8()
    Float8    W = q * scale[row // rows, column // columns]  e4m3, one scale a tensor, a row or a block

A weight splits into `tensors()`, which an autograd.Function can save, and a hashable `layout()`; `expand(layout, tensors, dtype)`
is the matrix again. Nothing quantised is ever copied, and an expanded matrix belongs to the caller, who drops it after its product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Layout = tuple
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Dense:
    """A weight kept as a tensor [out, in]; the only form that may require a gradient."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.tensor.shape)

    def layout(self) -> Layout:
        return ("dense", self.shape)

    def tensors(self) -> Tensors:
        return (self.tensor,)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return expand(self.layout(), self.tensors(), dtype)


FrozenWeight = Dense


def as_weight(weight: torch.Tensor | FrozenWeight) -> FrozenWeight:
    """A tensor [out, in] as a Dense weight; any other form as it is."""
    return Dense(weight) if isinstance(weight, torch.Tensor) else weight


def expand(layout: Layout, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in] in `dtype`: the stored tensor itself for a dense weight of that dtype, else one launch. Not differentiable."""
    return tensors[0].to(dtype)
