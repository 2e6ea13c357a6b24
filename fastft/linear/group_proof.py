"""The proof of a linear group: small layers of the same classes and settings as its members, stock beside the group
function.

What a 4-bit weight stands for is asked of the stock layer: the identity through its forward, and through its backward,
are the matrix of the reference. Where these two or fastft's own reading of the weight differ by more than rounding the
proof fails and says so.
An FP8 layer is held to its specification in plain torch: as it rounds its operands, so must ours.
Beside the dtypes of the parameters the group runs as mixed precision will run it: under autocast where parameters are
float32, on a float32 input where a 4-bit layer casts it. Adapters that drop out do so once more in every one of these:
with the masks that stock drew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from fastft.linear.float8_linear import Float8Linear, float8_weight
from fastft.linear.projection import Layer, base_of, base_weight, is_dense, is_float8
from fastft.linear.small_layers import Siblings, device_of, group_key, small_layers
from fastft.proving.clone import clone
from fastft.proving.prove import Proof, agree, cast_parameters, formula_is_enough, outputs_and_gradients, prove
from fastft.swapping.out_of_memory import not_for_want_of_memory
from fastft_kernels.numerics import compare
from fastft_kernels.quant.scaled_product import why_dense

__all__ = ["dense_in_float64", "group_key", "prove_group", "stock_matrices"]

ROWS = (3, 13)  # the input's leading sizes
CHUNK = 1024  # rows of the identity at a time
Cast = Callable[[Layer, torch.dtype], Layer]
Swap = Callable[[Layer], object]


def prove_group(members: Sequence[Layer], group_swap) -> Proof:
    """group_swap(layers): makes the layers given, in the order of their calls, one group."""
    device = device_of(members)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        stock = small_layers(members, device)
        return _prove(stock, lambda m: group_swap(list(m.layers)), device)


def _prove(stock: Siblings, swap: Swap, device: torch.device) -> Proof:
    bases = [base_of(m) for m in stock.layers]
    quantised = [b for b in bases if not is_dense(b) and not is_float8(b)]
    float8 = [b for b in bases if is_float8(b)]
    dense = list(dict.fromkeys(t.dtype for b in bases if is_dense(b) for t in (b.weight, b.bias) if t is not None))
    if quantised and len(dense) > 1:
        return Proof(
            False, reason=f"quantised weights beside others of several dtypes: {', '.join(sorted(map(str, dense)))}"
        )
    if quantised and float8:
        return Proof(False, reason="4-bit weights beside FP8 weights")
    dtype = (dense or [(quantised or float8)[0].compute_dtype or torch.float32])[0]
    width = _width(([*quantised, *float8] or bases)[0])
    inputs = lambda g, scale: [torch.randn(*ROWS, width, generator=g, dtype=torch.float64).to(device) * scale]
    if formula_is_enough():
        return prove(stock, swap, inputs, dtype=dtype, cast=dense_in_float64, reset=_freeze_float8)
    matrices: dict[Layer, torch.Tensor] = {}
    for base in quantised:
        matrices[base], reason = _matrix(base, dtype)
        if reason:
            return Proof(False, dtype=str(dtype).removeprefix("torch."), reason=reason)
    cast = lambda module, to: _cast(module, to, stock, matrices)
    proof = prove(stock, swap, inputs, dtype=dtype) if not quantised and not float8 else None
    asked = {b: b.products for b in float8}
    if proof is not None and not proof.ok:
        return proof
    for x_dtype, autocast in _ways(stock, dtype, dense, bool(quantised), device):
        stock.autocast = autocast
        for base, products in asked.items():  # float64 stands for what is computed in this dtype, on this device
            base.products = products
            base.products = "" if why_dense(float8_weight(base).layout(), autocast or x_dtype, device) else products
        reset = _freeze_bases if autocast else _freeze_float8
        found = prove(stock, swap, inputs, dtype=x_dtype, dtypes=(x_dtype,), cast=cast, reset=reset)
        found = found if not found.ok else _with_dropout(stock, swap, inputs, x_dtype, cast, device) or found
        if not found.ok:
            return (
                replace(found, reason=f"under autocast to {autocast}: {found.reason}".replace("torch.", ""))
                if autocast
                else found
            )
        proof = proof or found
    assert proof is not None
    return proof


def _freeze_bases(siblings: Layer) -> None:
    """A dense layer that does not train runs the stock way, whose sum of the siblings' input gradients rounds each of
    them to autocast's dtype: it does so from the start where the proof compares runs with different parameters in
    training."""
    for m in siblings.layers:
        if is_dense(base_of(m)):
            base_of(m).requires_grad_(False)
    _freeze_float8(siblings)


def _freeze_float8(siblings: Layer) -> None:
    """The weights that never train."""
    for m in siblings.modules():
        if isinstance(m, Float8Linear):
            m.weight.requires_grad_(False)
            m.weight_scale_inv.requires_grad_(False)


def _width(base: Layer) -> int:
    return base.in_features if isinstance(base, nn.Linear) else base.nx


def _ways(
    stock: Layer, dtype: torch.dtype, dense: list, quantised: bool, device: torch.device
) -> Iterator[tuple[torch.dtype, torch.dtype | None]]:
    """(the input's dtype, the dtype of autocast or None): as which the layers, each parameter in its own dtype, may
    run."""
    low = dtype in (torch.float16, torch.bfloat16)
    half = (
        dtype if low else torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16
    )
    if len(dense) < 2:  # stock raises otherwise
        yield dtype, None
    if quantised and low and not dense:
        yield torch.float32, None
    if any(p.dtype == torch.float32 for p in stock.parameters()):
        yield dtype, half
        if quantised and low and not dense:
            yield torch.float32, half


# what a 4-bit weight stands for


def stock_matrices(base: Layer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices [out, in], in `dtype`, by which a linear layer multiplies x in its forward and dy in its
    backward."""
    base, bias = clone(base).train(), base.bias
    base._parameters["bias"] = None
    width, outputs = base.in_features, base.out_features if bias is None else bias.shape[0]
    device = base.weight.device
    columns = []
    with torch.enable_grad():
        for start in range(0, width, CHUNK):
            x = torch.zeros(min(CHUNK, width - start), width, dtype=dtype, device=device)
            x.diagonal(start).fill_(1.0)
            columns.append(base(x.requires_grad_()).detach().t())
        x = torch.zeros(outputs, width, dtype=dtype, device=device, requires_grad=True)
        (backward,) = torch.autograd.grad(base(x), x, torch.eye(outputs, dtype=dtype, device=device))
    return torch.cat(columns, 1), backward


def _matrix(base: Layer, dtype: torch.dtype) -> tuple[torch.Tensor, str]:
    """(what the layer multiplies by, in float64; why the group function does not multiply by the same, or nothing)."""
    forward, backward = (m.double() for m in stock_matrices(base, dtype))
    ours = base_weight(base).dense(dtype).double()
    # the forward rounds to dtype, the backward to the dtype before quantisation and then to dtype
    rounding = 2 * max(torch.finfo(d).eps for d in (dtype, base.compute_dtype or dtype, base.weight.quant_state.dtype))
    if (off := _off(backward, forward)) > rounding:
        return (
            forward,
            "its 4-bit weight stands for one matrix in bitsandbytes' forward and for another in its backward: "
            f"{off:.2g} off",
        )
    if (off := _off(ours, forward)) > rounding:
        return forward, f"its 4-bit weight stands for another matrix in bitsandbytes than in fastft: {off:.2g} off"
    return forward, ""


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest element; infinite where one of them is NaN."""
    if a.shape != b.shape:
        return float("inf")
    off = float((a - b).abs().max()) / (float(b.abs().max()) or 1.0)
    return off if off == off else float("inf")


def _cast(module: Layer, dtype: torch.dtype, stock: Layer, matrices: dict[Layer, torch.Tensor]) -> Layer:
    """As `cast_parameters`, but each parameter stays in its own dtype in any below float64, where a 4-bit layer is its
    matrix."""
    module = clone(module)
    if dtype != torch.float64:
        return module
    names = {n: matrices[m] for n, m in stock.named_modules() if m in matrices}
    for name, child in list(module.named_modules()):
        if name in names and _is_quantised_layer(child):
            parent, _, last = name.rpartition(".")
            module.get_submodule(parent)._modules[last] = _dense(child, names[name])
    return _with_float8(cast_parameters(module, dtype), module)


def _with_float8(cast: Layer, module: Layer) -> Layer:
    """`cast`, a copy of `module`, with FP8 weights as they are: they and their scales mean the same in any dtype."""
    for new, old in zip(cast.modules(), module.modules()):
        if isinstance(old, Float8Linear):
            new.weight.data, new.weight_scale_inv.data = old.weight.data, old.weight_scale_inv.data
    return cast


def dense_in_float64(module: Layer, dtype: torch.dtype) -> Layer:
    """As `cast_parameters`; a quantised base becomes, in float64, the dense layer of bitsandbytes' own dequantisation,
    and is itself in lower dtypes. For modules of any size, which `stock_matrices` is not."""
    module = clone(module)
    if dtype != torch.float64:
        return module
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and _is_quantised_layer(child):
                from bitsandbytes.functional import dequantize_4bit

                parent._modules[name] = _dense(
                    child, dequantize_4bit(child.weight.data, child.weight.quant_state).double()
                )
    return _with_float8(cast_parameters(module, dtype), module)


def _is_quantised_layer(module: Layer) -> bool:
    # a LoRA layer shows its base's weight as a property
    return hasattr(module._parameters.get("weight"), "quant_state")


def _dense(layer: Layer, weight: torch.Tensor) -> Layer:
    """A float64 nn.Linear in the place of a quantised base. weight: [out, in], float64; copied."""
    dense = nn.Linear(
        weight.shape[1], weight.shape[0], bias=layer.bias is not None, dtype=torch.float64, device=weight.device
    )
    dense.weight.data = weight.clone()
    dense.weight.requires_grad_(False)
    if layer.bias is not None:
        dense.bias.data = layer.bias.data.double()
        dense.bias.requires_grad_(layer.bias.requires_grad)
    return dense


# dropout


class _Dropped(nn.Module):
    """Dropout by a given mask."""

    def __init__(self, mask: torch.Tensor, p: float):
        super().__init__()
        self.mask, self.k = mask, 1.0 / (1.0 - p) if p < 1.0 else 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask * self.k


def _with_dropout(
    stock: Siblings, swap: Swap, inputs, dtype: torch.dtype, cast: Cast, device: torch.device
) -> Proof | None:
    """The group with its dropouts on, from the same random state as stock. None: nothing drops out. The reference drops
    what stock dropped: on a GPU which elements these are depends on the dtype, in float64 on another."""
    layer = _training(clone(stock))
    if layer is None:
        return None
    name = str(dtype).removeprefix("torch.")
    draw = lambda up: [t.to(dtype).to(up).requires_grad_() for t in inputs(torch.Generator().manual_seed(29), 1.0)]
    run = lambda m, up, reference=False: outputs_and_gradients(m, draw(up), m.named_parameters(), 97, reference)
    masks: dict[str, torch.Tensor] = {}
    for n, drop in _dropouts(layer):
        drop.register_forward_hook(lambda _, args, y, n=n: masks.__setitem__(n, (y != 0) | (args[0] == 0)))
    _seed(device)
    eager = run(layer, dtype)
    after = _state(device)
    exact = cast(stock, torch.float64)
    for n, drop in _dropouts(exact):
        if n in masks:
            parent, _, last = n.rpartition(".")
            exact.get_submodule(parent)._modules[last] = _Dropped(masks[n], drop.p)
    reference = run(exact, torch.float64, True)
    plain64, fast64, fast = (
        _training(m) for m in (cast(stock, torch.float64), cast(stock, torch.float64), clone(stock))
    )
    try:
        _seed(device)
        reference64 = run(plain64, torch.float64, True)
        swap(fast64)
        _seed(device)
        if reason := agree(run(fast64, torch.float64, True), reference64):
            return Proof(False, dtype=name, reason=f"with dropout: {reason}")
        swap(fast)
        _seed(device)
        ours = run(fast, dtype)
    except Exception as e:
        not_for_want_of_memory(e)
        return Proof(False, dtype=name, reason=f"with dropout the candidate raised {type(e).__name__}: {e}")
    if not torch.equal(_state(device), after):
        return Proof(False, dtype=name, reason="with dropout: it leaves the random stream in another place than stock")
    verdict = compare(ours, reference, eager)
    return None if verdict else Proof(False, verdict.error, verdict.eager_error, name, f"with dropout: {verdict}")


def _dropouts(module: Layer) -> list[tuple[str, Layer]]:
    return [(n, m) for n, m in module.named_modules() if type(m) is nn.Dropout and m.p > 0]


def _training(module: Layer) -> Layer | None:
    """The module with its dropouts on; None where it has none."""
    found = _dropouts(module)
    for _, drop in found:
        drop.train()
    return module if found else None


def _generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _seed(device: torch.device) -> None:
    """The same place in the random stream of `device`, and of no other."""
    for generator in {torch.default_generator, _generator(device)}:
        generator.manual_seed(53)


def _state(device: torch.device) -> torch.Tensor:
    return _generator(device).get_state()
