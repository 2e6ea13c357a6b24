"""A frozen linear layer whose weight is kept in FP8: an nn.Linear to PEFT, to `state_dict` and to whoever asks.

    y = x W^T + bias,   W = weight * weight_scale_inv (one scale for each row, or for each block)

`weight` (float8_e4m3fn) and `weight_scale_inv` (float32) are parameters under the names of transformers' fine-grained
FP8. Its forward is the group function of one layer, so that an unpatched model computes what a patched one does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastft.compat.torch_private import KeepsDtypes
from fastft.swapping.swap import KEY
from fastft_kernels.lora.lora_linear import Projection, lora_linear
from fastft_kernels.quant.fp8 import quantize_e4m3_blocks, quantize_e4m3_rows
from fastft_kernels.quant.scaled_product import PRODUCTS, Underflow, specified
from fastft_kernels.quant.weights import Float8

SCALE = "weight_scale_inv"


class Float8Linear(KeepsDtypes, nn.Linear):
    """Made of a linear layer by `Float8Linear.of`, in its place.

    block: (rows, columns) of a scale, None for one scale a row. products: which products multiply in FP8 where they can
    ("", "forward", "both", as `Float8`). compute_dtype: of the weight that it was made of, which is what adapters are
    made in. choice: a line on how `products` came about, for the report. is_specification: computes in plain torch, for
    proofs. underflow: one for a model, looks at the gradients that are rounded. Casting the model (`.to(dtype)`) casts
    the bias alone. Differentiable in x and the bias, never in the weight."""

    block: tuple[int, int] | None
    products: str
    compute_dtype: torch.dtype
    is_specification: bool
    underflow: Underflow | None
    choice: str = ""
    kept = frozenset(("weight", SCALE))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., out] of input [..., in], in its dtype or autocast's. RuntimeError where the weight is to learn."""
        weight, bias = float8_weight(self), self.bias
        kind = input.device.type
        compute = input.dtype
        if torch.is_autocast_enabled(kind) and compute != torch.float64:
            compute = torch.get_autocast_dtype(kind)
        if self.is_specification:
            y = specified(input.to(compute), weight.layout(), weight.q, weight.scale)
            return y if bias is None else y + bias.to(compute)
        return lora_linear(input, [Projection(weight, bias)], compute_dtype=compute)[0]

    def extra_repr(self) -> str:
        """As nn.Linear's, and how it is kept."""
        block = "rows" if self.block is None else f"blocks of {self.block[0]} x {self.block[1]}"
        return f"{super().extra_repr()}, e4m3 by {block}"

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        block: tuple[int, int] | None = None,
        products: str = "both",
        underflow: Underflow | None = None,
    ) -> Float8Linear:
        """The same instance, its weight quantised where it lies and frozen; its bias, hooks and mode stay.

        Raises TypeError for anything but a plain, unpatched nn.Linear with a weight of its own."""
        weight = linear._parameters.get("weight")
        if type(linear) is not nn.Linear or KEY in linear.__dict__ or type(weight) is not nn.Parameter:
            raise TypeError(
                f"Float8Linear.of: want an nn.Linear that is not patched, with a plain weight, got a "
                f"{type(linear).__name__} with a {type(weight).__name__}: quantise before fastft.patch"
            )
        with torch.no_grad():
            q, scale = quantize_e4m3_rows(weight) if block is None else quantize_e4m3_blocks(weight, block)
        return cls.taken(linear, q, scale, block, products, weight.dtype, underflow)

    @classmethod
    def taken(
        cls,
        linear: nn.Linear,
        q: torch.Tensor,
        scale: torch.Tensor,
        block: tuple[int, int] | None,
        products: str,
        compute_dtype: torch.dtype,
        underflow: Underflow | None = None,
    ) -> Float8Linear:
        """The same instance with q [out, in] and its float32 scales as they are, uncopied."""
        if products not in PRODUCTS:
            raise ValueError(f"Float8Linear: want products in {PRODUCTS}, got {products!r}")
        made: Any = linear
        made.__class__ = cls
        made.weight = nn.Parameter(q, requires_grad=False)
        made.register_parameter(SCALE, nn.Parameter(scale, requires_grad=False))
        made.block, made.products, made.compute_dtype, made.is_specification = block, products, compute_dtype, False
        made.underflow = underflow
        return made

    def _cast_to(self, dtype: torch.dtype) -> None:
        if dtype.is_floating_point and dtype.itemsize > 1 and dtype != torch.float64:
            self.compute_dtype = dtype


def float8_weight(layer: Any) -> Float8:
    """The weight [out, in] of a Float8Linear, uncopied. Raises RuntimeError where it is to learn."""
    weight, scale = layer._parameters["weight"], layer._parameters[SCALE]
    if weight.requires_grad or scale.requires_grad:
        raise RuntimeError(
            "Float8Linear: an FP8 weight is frozen, and its requires_grad is True: train adapters on it, or load "
            "without load_in_fp8"
        )
    return Float8(weight, scale, layer.block, layer.products, layer.underflow)


def float8_layers(model: nn.Module) -> list[Float8Linear]:
    """Every Float8Linear in the model, patched or not."""
    return [m for m in model.modules() if isinstance(m, Float8Linear)]
