"""Small layers of the classes and settings of a linear group's members, for its proof: the same adapters, fewer
outputs.

A dense base is small in both directions, as its products are a library's. An FP8 one keeps its in_features, on which
its launches depend, and whether its outputs are a multiple that FP8 products take; it has several blocks of them. A
4-bit one keeps its in_features, on which the way depends in which its blocks lie in its rows, and so which code of
bitsandbytes runs; its outputs are as many as give each kernel more than two tiles, the absmax of a nested one more
than one block, and where the width allows it a last block and a last tile that are not full."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn

from fastft.compat.accelerate_private import LEFT_BY_HOOKS, execution_device
from fastft.compat.peft_private import enable_adapters
from fastft.compat.torch_private import FakeTensor
from fastft.linear.float8_linear import Float8Linear
from fastft.linear.projection import LORA_LAYERS, Layer, base_of, is_dense, is_float8
from fastft.swapping.swap import KEY, stock_class
from fastft_kernels.quant.nf4 import TILE
from fastft_kernels.quant.scaled_product import MULTIPLE

N_IN, N_OUT = 64, 40  # of dense bases
MIN_OUT = 24  # of 4-bit ones
NESTED_BLOCKS = 256  # what bitsandbytes quantises of absmax together
ELEMENTS = 2 * TILE  # of a tile of the kernel that dequantises, two a byte


class Siblings(nn.Module):
    """Several layers over the same input. autocast: the dtype under which their forward runs."""

    def __init__(self, layers: Sequence[Layer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.autocast: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        with contextlib.nullcontext() if self.autocast is None else torch.autocast(x.device.type, self.autocast):
            return [layer(x) for layer in self.layers]


def group_key(members: Sequence[Layer]) -> Hashable:
    """What the proof of a group of these members depends on."""
    return tuple(map(_member_key, members))


def _member_key(module: Layer) -> Hashable:
    base = base_of(module)
    bias = None if base.bias is None else base.bias.dtype
    key = (stock_class(module), stock_class(base), bias, base.weight.dtype, device_of([module]).type)
    if is_float8(base):
        key += (base.block, base.products, base.compute_dtype, base.in_features, base.out_features % MULTIPLE)
        key += (base.weight_scale_inv.dtype,)
    elif not is_dense(base):
        names = ("quant_type", "blocksize", "compress_statistics", "quant_storage")
        key += (*(getattr(base.weight, n, None) for n in names), getattr(base, "compute_dtype", None), base.in_features)
        key += _state_key(getattr(base.weight, "quant_state", None))
    if stock_class(module) in LORA_LAYERS:
        for n, a in module.lora_A.items():
            b, drop = module.lora_B[n], module.lora_dropout[n]
            biased = None if b.bias is None else b.bias.dtype
            key += (
                (
                    n,
                    a.weight.dtype,
                    a.weight.shape[0],
                    b.weight.dtype,
                    biased,
                    module.scaling[n],
                    type(drop),
                    getattr(drop, "p", 0.0),
                ),
            )
        key += (tuple(module.active_adapters), module.disable_adapters)
    return key


def _state_key(state) -> tuple:
    """What of a quantisation's state decides how it is read, beside its numbers of this layer."""
    if not _readable(state):
        return ()
    nested = (state.state2.blocksize, state.state2.dtype, _values(state.state2.code)) if state.nested else ()
    return (state.dtype, state.absmax.dtype, _values(state.code), *nested)


def _readable(state) -> bool:
    return state is not None and not state.code.is_meta and not isinstance(state.code, FakeTensor)


def _values(table: torch.Tensor) -> bytes:
    return table.detach().float().cpu().numpy().tobytes()


def device_of(members: Sequence[Layer]) -> torch.device:
    """Where the members run: where their parameters lie, or, where these are fetched for each call, where they are
    fetched to."""
    for p in (p for m in members for p in m.parameters()):
        if p.device.type != "meta":
            return p.device
    for sub in (s for m in members for s in m.modules()):
        device = execution_device(sub)
        if device is not None and device != "meta":
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cpu")


def outputs_4bit(base: Layer) -> int:
    """How many outputs the small copy of a 4-bit layer has."""
    state, block, width = getattr(base.weight, "quant_state", None), base.weight.blocksize, base.in_features
    nested = base.weight.compress_statistics if state is None else state.nested
    tile = max(ELEMENTS, block)
    wanted = max(2 * tile, NESTED_BLOCKS * block if nested else 0) + 1
    least = max(MIN_OUT, -(-wanted // width) + 1)
    ragged = lambda rows: ((rows * width) % block != 0, (rows * width) % tile != 0)
    return max(range(least, least + 16), key=lambda rows: (*ragged(rows), -rows))


def outputs_float8(base: Layer) -> int:
    """How many outputs the small copy of an FP8 layer has: more than one block of them."""
    wanted = N_OUT if base.block is None else base.block[0] + 1
    whole = -(-wanted // MULTIPLE) * MULTIPLE
    return whole if base.out_features % MULTIPLE == 0 else whole - MULTIPLE // 2


def small_layers(members: Sequence[Layer], device: torch.device) -> Siblings:
    """Layers like the members, with random weights, in eval mode. The members stay as they are."""
    generator = torch.Generator().manual_seed(3)
    quantised = [base_of(m).in_features for m in members if not is_dense(base_of(m))]
    width = quantised[0] if quantised else N_IN
    return Siblings([_small(m, width, generator, device) for m in members]).eval()


def _small(module: Layer, width: int, generator: torch.Generator, device: torch.device) -> Layer:
    base, outputs = _small_base(base_of(module), width, generator, device)
    if stock_class(module) not in LORA_LAYERS:
        return base
    cls: Any = stock_class(module)
    small = cls.__new__(cls)
    small.__dict__.update(
        {k: copy.copy(v) for k, v in module.__dict__.items() if k not in (KEY, "_modules", "forward", *LEFT_BY_HOOKS)}
    )
    own = ("base_layer", "lora_A", "lora_B", "lora_dropout")
    small._modules = {
        n: copy.deepcopy(m) for n, m in module._modules.items() if n not in own
    }  # their mode is set below: never the model's
    small._modules["base_layer"] = base
    a, b, drop = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
    for name, old in module.lora_A.items():
        r, old_b, old_drop = old.weight.shape[0], module.lora_B[name], module.lora_dropout[name]
        a[name] = nn.Linear(width, r, bias=False, dtype=old.weight.dtype, device=device)
        b[name] = nn.Linear(r, outputs, bias=old_b.bias is not None, dtype=old_b.weight.dtype, device=device)
        drop[name] = nn.Dropout(old_drop.p) if type(old_drop) is nn.Dropout and old_drop.p > 0 else nn.Identity()
        for p in (*a[name].parameters(), *b[name].parameters()):
            p.data.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    small.lora_A, small.lora_B, small.lora_dropout = a, b, drop
    small.merged_adapters = []  # what is proven is what runs once they are unmerged and on
    enable_adapters(small)
    return small


def _small_base(base: Layer, width: int, generator: torch.Generator, device: torch.device) -> tuple[Layer, int]:
    """(the layer, how many outputs it has)."""
    outputs = N_OUT if is_dense(base) else outputs_float8(base) if is_float8(base) else outputs_4bit(base)
    weight = torch.randn(outputs, width, generator=generator) * width**-0.5
    if is_float8(base):
        small = nn.Linear(width, outputs, bias=base.bias is not None, dtype=base.compute_dtype, device=device)
        small.weight.data.copy_(weight)
        small = Float8Linear.of(small, base.block, base.products)
        small.is_specification = True
    elif not is_dense(base):
        small = _small_4bit(base, weight, device)
    elif stock_class(base) is nn.Linear:
        small = nn.Linear(width, outputs, bias=base.bias is not None, dtype=base.weight.dtype, device=device)
        small.weight.data.copy_(weight)
    else:
        small = stock_class(base)(outputs, width).to(device, base.weight.dtype)
        small.weight.data.copy_(weight.t())
    if small.bias is not None:
        small.bias.data = torch.randn(outputs, generator=generator).to(device, base.bias.dtype)
    return small, outputs


def _small_4bit(base: Layer, weight: torch.Tensor, device: torch.device) -> Layer:
    """A layer quantised as `base` is, whose tables are those of `base`."""
    state: Any = getattr(base.weight, "quant_state", None)
    outputs, width = weight.shape
    settings = dict(
        compress_statistics=base.weight.compress_statistics if state is None else state.nested,
        quant_type=base.weight.quant_type if state is None else state.quant_type,
        quant_storage=base.quant_storage,
    )
    small = stock_class(base)(width, outputs, bias=base.bias is not None, compute_dtype=base.compute_dtype, **settings)
    blocksize = base.weight.blocksize if state is None else state.blocksize
    dtype = (base.compute_dtype or torch.float32) if state is None else state.dtype
    small.weight = type(base.weight)(
        weight.to(dtype), requires_grad=False, blocksize=blocksize, module=small, **settings
    )
    small: Any = small.to(device)
    if state is not None and _readable(state):
        new = small.weight.quant_state
        new.code = state.code.to(device, copy=True)
        new.absmax = new.absmax.to(state.absmax.dtype)
        if state.nested:
            new.state2.code = state.state2.code.to(device, copy=True)
    return small
