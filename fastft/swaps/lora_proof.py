"""The proof of a linear group: small layers of the same classes and settings as its members, stock beside the group function."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence

import torch
from torch import nn

from fastft.patching.clone import clone
from fastft.patching.prove import Proof, cast_parameters, prove
from fastft.patching.swap import KEY, stock_class
from fastft.swaps.lora_state import LORA_LAYERS, base_of, is_dense

N_IN, N_OUT = 64, 40


class Siblings(nn.Module):
    """Several layers over the same input."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


def _is_quantised(base: nn.Module) -> bool:
    return not is_dense(base)


def group_key(members: Sequence[nn.Module]) -> Hashable:
    return tuple(map(_member_key, members))


def _member_key(module: nn.Module) -> Hashable:
    base = base_of(module)
    key = (stock_class(module), stock_class(base), base.bias is not None, base.weight.dtype, base.weight.device.type)
    if _is_quantised(base):
        names = ("quant_type", "blocksize", "compress_statistics", "quant_storage")
        key += (*(getattr(base.weight, n, None) for n in names), getattr(base, "compute_dtype", None))
    if stock_class(module) in LORA_LAYERS:
        key += tuple((n, a.weight.dtype, a.weight.shape[0], module.lora_B[n].bias is not None, module.scaling[n]) for n, a in module.lora_A.items())
        key += (tuple(module.active_adapters), module.disable_adapters)
    return key


def _small_base(base: nn.Module, generator: torch.Generator, device: torch.device) -> nn.Module:
    weight = torch.randn(N_OUT, N_IN, generator=generator) * N_IN**-0.5
    if _is_quantised(base):
        small = stock_class(base)(
            N_IN, N_OUT, bias=base.bias is not None, compute_dtype=base.compute_dtype,
            compress_statistics=base.weight.compress_statistics, quant_type=base.weight.quant_type, quant_storage=base.quant_storage,
        )  # fmt: skip
        small.weight = type(base.weight)(
            weight.to(base.compute_dtype or torch.float32), requires_grad=False, blocksize=base.weight.blocksize,
            compress_statistics=base.weight.compress_statistics, quant_type=base.weight.quant_type, quant_storage=base.quant_storage, module=small,
        )  # fmt: skip
        small = small.to(device)
    elif stock_class(base) is nn.Linear:
        small = nn.Linear(N_IN, N_OUT, bias=base.bias is not None, dtype=base.weight.dtype, device=device)
        small.weight.data.copy_(weight)
    else:
        small = stock_class(base)(N_OUT, N_IN).to(device, base.weight.dtype)
        small.weight.data.copy_(weight.t())
    if small.bias is not None:
        small.bias.data = torch.randn(N_OUT, generator=generator).to(device, base.bias.dtype)
    return small


def _small(module: nn.Module, generator: torch.Generator, device: torch.device) -> nn.Module:
    base = _small_base(base_of(module), generator, device)
    if stock_class(module) not in LORA_LAYERS:
        return base
    small = stock_class(module).__new__(stock_class(module))
    small.__dict__.update({k: copy.copy(v) for k, v in module.__dict__.items() if k not in (KEY, "_modules", "forward", "_hf_hook", "_old_forward")})
    own = ("base_layer", "lora_A", "lora_B", "lora_dropout")
    small._modules = {n: copy.deepcopy(m) for n, m in module._modules.items() if n not in own}  # their mode is set below: never the model's
    small._modules["base_layer"] = base
    a, b, drop = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
    for name, old in module.lora_A.items():
        r, dtype = old.weight.shape[0], old.weight.dtype
        a[name] = nn.Linear(N_IN, r, bias=False, dtype=dtype, device=device)
        b[name] = nn.Linear(r, N_OUT, bias=module.lora_B[name].bias is not None, dtype=dtype, device=device)
        drop[name] = nn.Identity()
        for p in (*a[name].parameters(), *b[name].parameters()):
            p.data.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    small.lora_A, small.lora_B, small.lora_dropout = a, b, drop
    small.merged_adapters, small._disable_adapters = [], False  # what is proven is what runs once they are unmerged and on
    return small


def dense_in_float64(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As `cast_parameters`; a quantised base becomes, in float64, the dense layer that it stands for, and is itself in lower ones."""
    if dtype != torch.float64:
        return clone(module)
    module = clone(module)
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and _is_quantised_layer(child):
                parent._modules[name] = _dense(child)
    return cast_parameters(module, dtype)


def _is_quantised_layer(module: nn.Module) -> bool:
    return hasattr(module._parameters.get("weight"), "quant_state")  # a LoRA layer shows its base's weight as a property


def _dense(layer: nn.Module) -> nn.Module:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, dtype=torch.float64, device=weight.device)
    dense.weight.data = weight
    dense.weight.requires_grad_(False)
    if layer.bias is not None:
        dense.bias.data = layer.bias.data.double()
        dense.bias.requires_grad_(layer.bias.requires_grad)
    return dense


def prove_group(members: Sequence[nn.Module], group_swap) -> Proof:
    """group_swap(layers): makes the layers given, in the order of their calls, one group."""
    device = next((p.device for m in members for p in m.parameters() if p.device.type != "meta"), torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    stock = Siblings([_small(m, generator, device) for m in members]).eval()
    inputs = lambda g, scale: [torch.randn(2, 5, N_IN, generator=g, dtype=torch.float64).to(device) * scale]
    bases = [base_of(m) for m in members]
    dense = {b.weight.dtype for b in bases if not _is_quantised(b)}
    quantised = any(map(_is_quantised, bases))
    if quantised and len(dense) > 1:
        return Proof(False, reason=f"quantised weights beside others of several dtypes: {', '.join(sorted(map(str, dense)))}")
    dtype = next((b.weight.dtype for b in bases if not _is_quantised(b)), None) or bases[0].compute_dtype or torch.float32
    settings = dict(dtypes=(dtype,), cast=dense_in_float64) if quantised else dict(dtypes=None)
    swap = lambda m: group_swap(list(m.layers))
    return prove(stock, swap, inputs, dtype=dtype, **settings)
