"""`load_in_fp8`: a model's frozen linear layers in FP8, from a dense checkpoint or from one that is in FP8 already.

A dense checkpoint is read to the host; the adapter is put on, as on the dense model; then one layer after the other
goes to its device and is quantised there, so that no more than one dense weight is ever on it. Of a checkpoint in
transformers' fine-grained FP8 the layers are taken as they come: same values, same scales, no copy. (Without a device
that has FP8 units transformers makes them dense; they are quantised again, in the checkpoint's own blocks.)"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastft.errors import QuantizationError
from fastft.linear.float8_linear import Float8Linear
from fastft_kernels.quant.fp8 import BLOCK
from fastft_kernels.quant.scaled_product import Underflow

BACKWARDS = {"fp8": "both", "bf16": "forward"}


@dataclass(frozen=True)
class Float8Request:
    """What `load_in_fp8` asks for. block: of scales, None for one a row; products: as Float8Linear's; is_fp8: the
    checkpoint holds FP8 weights itself."""

    block: tuple[int, int] | None
    products: str
    is_fp8: bool = False
    underflow: Underflow = field(default_factory=Underflow)


def float8_request(asked: bool | str, backward: str, others: dict[str, Any], config: Any) -> Float8Request | None:
    """None where nothing is asked for. others: what else was given about precision, by its keyword; a value that is
    true excludes FP8. Raises QuantizationError."""
    if backward not in BACKWARDS:
        raise QuantizationError(f'fp8_backward={backward!r}: want "fp8" or "bf16"')
    if asked is False:
        if backward != "fp8":
            raise QuantizationError(f"fp8_backward={backward!r} without load_in_fp8=True: pass both, or neither")
        return None
    if not (asked is True or asked in ("rows", "blocks")):
        raise QuantizationError(
            f'load_in_fp8={asked!r}: want True or "rows" (a scale for each row), or "blocks" (128 x 128)'
        )
    if given := [name for name, value in others.items() if value]:
        raise QuantizationError(f"load_in_fp8 and {given[0]} were both given: choose one")
    block = BLOCK if asked == "blocks" else None
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return Float8Request(block, BACKWARDS[backward])
    get = stored.get if isinstance(stored, dict) else lambda key, default=None: getattr(stored, key, default)
    if (how := str(getattr(get("quant_method"), "value", get("quant_method")))) != "fp8":
        raise QuantizationError(f"this checkpoint is quantised already ({how}): leave load_in_fp8 out")
    sides = get("weight_block_size")
    block = (int(sides[0]), int(sides[1])) if sides else block
    return Float8Request(block, BACKWARDS[backward], True)


def linears_of(model: Any) -> list[nn.Linear]:
    """The layers that can be in FP8: linear layers by their exact class, but the head."""
    asked = [getattr(model, name, None) for name in ("get_output_embeddings", "get_input_embeddings")]
    head, embeddings = (None if ask is None else ask() for ask in asked)
    tied = {id(getattr(m, "weight", m)) for m in (head, embeddings) if m is not None}
    return [m for m in model.modules() if type(m) is nn.Linear and m is not head and id(m.weight) not in tied]


def take_float8(model: Any, products: str, underflow: Underflow | None = None) -> int:
    """Layers that transformers loaded in FP8 become Float8Linear, their weights and scales uncopied; how many there
    were."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    found: list[Any] = [m for m in model.modules() if type(m) is FP8Linear and m.weight.element_size() == 1]
    halves = (p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() == 2)
    dtype = next(halves, torch.bfloat16)
    for layer in found:
        scale, block = layer.weight_scale_inv.data.float(), layer.block_size
        if block is None:
            scale = scale.reshape(1, 1).repeat(layer.out_features, 1)
        sides = None if block is None else (int(block[0]), int(block[1]))
        Float8Linear.taken(layer, layer.weight.data, scale, sides, products, dtype, underflow)
    return len(found)


def quantise(model: nn.Module, linears: list[nn.Linear], request: Float8Request, device: torch.device | None) -> int:
    """Those of `linears` that the model still has and that do not learn are quantised, then the rest of the model goes
    to `device` (None: everything stays where it is); how many they were. A bare model's are frozen. Raises
    QuantizationError for weights that are not here."""
    inside = {id(m) for m in model.modules()}
    bare = not hasattr(model, "peft_config")
    count = 0
    for linear in linears:
        if id(linear) not in inside or not (bare or not linear.weight.requires_grad):
            continue
        if linear.weight.is_meta or hasattr(linear.weight, "ds_id"):
            raise QuantizationError(
                "load_in_fp8 needs the weights here, and some are offloaded or sharded: load on one device "
                "(device_map left out), or in another precision"
            )
        if device is not None:
            linear.to(device)
        Float8Linear.of(linear, request.block, request.products, request.underflow)
        count += 1
    if device is not None:
        model.to(device)
    return count
