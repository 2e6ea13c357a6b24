"""A base weight W [out, in], in whatever form it is stored: `.dense(dtype)` is the matrix a product needs.

    Dense     W                                              a tensor; may require a gradient
    NF4       W = code[nibble] * absmax[block]               bitsandbytes 4-bit (NF4 or FP4), absmax possibly quantised
              itself
    Int8      W = CB * SCB[row] / 127                        bitsandbytes LLM.int8()
    Float8    W = q * scale[row // rows, column // columns]  e4m3, one scale a tensor, a row or a block

A weight splits into `tensors()`, which an autograd.Function can save, and a hashable `layout()`; `expand(layout,
tensors, dtype)` is the matrix again. Nothing quantised is ever copied, and an expanded matrix belongs to the caller,
who drops it after its product. A float64 matrix (for tests) is the float32 one widened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastft_kernels.quant.int8 import dequantize_e4m3, dequantize_int8
from fastft_kernels.quant.nf4 import Nested, dequantize_4bit

Tensors = tuple[torch.Tensor, ...]


class WeightLayout(NamedTuple):
    """What a weight is apart from its tensors."""

    kind: str  # "dense", "4bit", "int8", "float8"
    shape: tuple[int, int]
    # 4bit: (blocksize, quant_type, blocksize2 or None); float8: (the block or None, the products in FP8, who looks on)
    options: tuple = ()


class FrozenWeight:
    """Base of the forms. Subclasses are frozen dataclasses with `shape`, `layout()` and `tensors()`."""

    shape: tuple[int, int]

    def layout(self) -> WeightLayout:
        """How the stored tensors are read; hashable."""
        raise NotImplementedError

    def tensors(self) -> Tensors:
        """The stored tensors, in the order that `expand` takes them."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [out, in] in `dtype`: the tensor itself for a dense weight of that dtype, else one launch. No
        gradient."""
        return expand(self.layout(), self.tensors(), dtype)


@dataclass(frozen=True)
class Dense(FrozenWeight):
    """A weight kept as a tensor [out, in], any strides; the only form that may require a gradient."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.tensor.shape)

    def layout(self) -> WeightLayout:
        return WeightLayout("dense", self.shape)

    def tensors(self) -> Tensors:
        return (self.tensor,)


@dataclass(frozen=True)
class NF4(FrozenWeight):
    """bitsandbytes 4-bit storage; the fields are the arguments of `nf4.dequantize_4bit`."""

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    blocksize: int
    shape: tuple[int, int]
    quant_type: str = "nf4"
    nested: Nested | None = None

    @classmethod
    def from_quant_state(cls, packed: torch.Tensor, state: Any) -> NF4:
        """packed: a Params4bit or its data; state: its bitsandbytes QuantState. ValueError where a CPU repacked the
        weight."""
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("NF4: want bitsandbytes' portable layout, got a weight repacked for a CPU")
        nested = None
        if state.nested:
            nested = (state.state2.absmax, state.state2.code, state.state2.blocksize, state.offset)
        return cls(packed, state.absmax, state.code, state.blocksize, tuple(state.shape), state.quant_type, nested)

    def layout(self) -> WeightLayout:
        blocksize2 = None if self.nested is None else self.nested[2]
        return WeightLayout("4bit", self.shape, (self.blocksize, self.quant_type, blocksize2))

    def tensors(self) -> Tensors:
        flat = (self.packed, self.absmax, self.code)
        return flat if self.nested is None else (*flat, self.nested[0], self.nested[1], self.nested[3])


@dataclass(frozen=True)
class Int8(FrozenWeight):
    """bitsandbytes LLM.int8() storage: CB [out, in] int8, SCB [out] float32."""

    CB: torch.Tensor
    SCB: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.CB.shape)

    def layout(self) -> WeightLayout:
        return WeightLayout("int8", self.shape)

    def tensors(self) -> Tensors:
        return (self.CB, self.SCB)


@dataclass(frozen=True)
class Float8(FrozenWeight):
    """float8_e4m3fn [out, in] with scales as `int8.dequantize_e4m3` takes them. products: which of a group's products
    multiply in FP8 where they can (`scaled_product`): none (""), the forward's ("forward"), the input gradient's too
    ("both"). underflow: a `scaled_product.Underflow` that looks at the gradients that are rounded, or None."""

    q: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int] | None = None
    products: str = ""
    underflow: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.q.shape)

    def layout(self) -> WeightLayout:
        return WeightLayout("float8", self.shape, (self.block, self.products, self.underflow))

    def tensors(self) -> Tensors:
        return (self.q, self.scale)


def as_weight(weight: torch.Tensor | FrozenWeight) -> FrozenWeight:
    """A tensor [out, in] as a Dense weight; any other form as it is."""
    return Dense(weight) if isinstance(weight, torch.Tensor) else weight


def expand(layout: WeightLayout, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in] in `dtype`: the stored tensor itself for a dense weight of that dtype, else one launch."""
    if layout.kind == "dense":
        return tensors[0].to(dtype)
    if dtype == torch.float64:
        return expand(layout, tensors, torch.float32).to(dtype)
    if layout.kind == "int8":
        return dequantize_int8(*tensors, dtype)
    if layout.kind == "float8":
        return dequantize_e4m3(*tensors, dtype, layout.options[0])
    blocksize, quant_type, blocksize2 = layout.options
    nested = None if blocksize2 is None else (tensors[3], tensors[4], blocksize2, tensors[5])
    return dequantize_4bit(*tensors[:3], blocksize, layout.shape, dtype, quant_type=quant_type, nested=nested)
