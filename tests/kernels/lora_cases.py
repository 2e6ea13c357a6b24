"""For the tests of lora_linear: PEFT's own LoRA layers as the eager baseline, the formula in fp64 as the
reference."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from fastft_kernels.lora.lora_linear import Adapter, Projection
from fastft_kernels.numerics import compare
from fastft_kernels.quant.weights import NF4, Int8, as_weight


@dataclass
class Case:
    """n projections over one input. mode: "plain" (adapters in base dtype), "wide" (float32 adapters, no autocast),
    "autocast" (float32 adapters, autocast to `dtype`), "autocast fp32" (float32 base and input as well)."""

    outs: Sequence[int] = (48, 32, 40)
    width: int = 64
    tokens: tuple[int, ...] = (2, 17)
    ranks: Sequence[int] = (8, 8, 8)
    alphas: Sequence[float] = (13.6, 13.6, 13.6)
    mode: str = "plain"
    dropout: float = 0.0
    bias: bool = False
    rslora: bool = False
    lora_bias: bool = False
    adapters: tuple[str, ...] = ("default",)
    bare: tuple[int, ...] = ()  # projections without an adapter
    trainable_base: bool = False
    base: Callable[[nn.Linear], nn.Module] = field(default=lambda linear: linear)

    @property
    def n(self) -> int:
        return len(self.outs)


class Siblings(nn.Module):
    def __init__(self, linears: Sequence[nn.Module]):
        super().__init__()
        for i, linear in enumerate(linears):
            setattr(self, f"p{i}", linear)
        self.n = len(linears)

    @property
    def layers(self) -> list[nn.Module]:
        return [getattr(self, f"p{i}") for i in range(self.n)]

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


def build(case: Case, dtype: torch.dtype, device) -> Siblings:
    """Random siblings with PEFT's adapters, all of them active, every parameter of an adapter random."""
    base_dtype = torch.float32 if case.mode == "autocast fp32" else dtype
    linears = []
    for out in case.outs:
        linear = nn.Linear(case.width, out, bias=case.bias)
        linears.append(case.base(linear.requires_grad_(False).to(device=device, dtype=base_dtype)))
    model = Siblings(linears)
    return adapt(model, [f"p{i}" for i in range(case.n)], case, dtype)


def adapt(model: nn.Module, names: Sequence[str], case: Case, dtype: torch.dtype) -> nn.Module:
    """PEFT's adapters on the linears `names` of model (in place)."""
    targets = [name for i, name in enumerate(names) if i not in case.bare]
    for adapter in case.adapters if targets else ():
        config = LoraConfig(
            target_modules=targets,
            rank_pattern={name: r for name, r in zip(names, case.ranks) if name in targets},
            alpha_pattern={name: a for name, a in zip(names, case.alphas) if name in targets},
            lora_dropout=case.dropout,
            use_rslora=case.rslora,
            lora_bias=case.lora_bias,
        )
        with warnings.catch_warnings():  # of a second adapter
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, model, adapter_name=adapter)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            if len(case.adapters) > 1:
                module.set_adapter(list(case.adapters))
            for name, p in module.named_parameters():
                if "lora_" in name:
                    p.data = p.data.float() if case.mode != "plain" else p.data.to(dtype)
                    p.requires_grad_(True)
    if case.trainable_base:
        for name, p in model.named_parameters():
            if "lora_" not in name and p.is_floating_point():
                p.requires_grad_(True)
    return model


def randomise(model: nn.Module) -> None:
    """Every floating parameter anew: A and W keep the size of their input, B and biases are half of that."""
    for name, p in model.named_parameters():
        if p.is_floating_point() and not hasattr(p, "quant_state"):
            with torch.no_grad():
                p.normal_(std=p.shape[-1] ** -0.5 * (0.5 if "lora_B" in name or p.dim() == 1 else 1.0))


def projection_of(layer: nn.Module, training: bool = True) -> Projection:
    """What lora_linear is told of a (PEFT) linear layer."""
    base = layer.base_layer if hasattr(layer, "base_layer") else layer
    weight = base.weight
    if hasattr(weight, "quant_state"):
        weight = NF4.from_quant_state(weight.data, weight.quant_state)
    elif hasattr(weight, "SCB"):
        weight = Int8(weight.data, weight.SCB) if base.state.CB is None else Int8(base.state.CB, base.state.SCB)
    adapters = []
    for name in getattr(layer, "active_adapters", ()):
        if name in layer.lora_A:
            drop = layer.lora_dropout[name]
            p = drop.p if isinstance(drop, nn.Dropout) and training else 0.0
            B = layer.lora_B[name]
            adapters.append(Adapter(layer.lora_A[name].weight, B.weight, layer.scaling[name], B.bias, p))
    return Projection(weight, base.bias, tuple(adapters))


def leaves(model: nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def autocast(mode: str, dtype: torch.dtype, device):
    if mode.startswith("autocast"):
        return torch.autocast(torch.device(device).type, dtype=dtype)
    return contextlib.nullcontext()


def compute_dtype(mode: str, dtype: torch.dtype) -> torch.dtype | None:
    return dtype if mode.startswith("autocast") else None


class Reference:
    """The formula in float64 (or `dtype`); parameters by identity become leaves of it. Draws dropout's masks as stock
    does."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        self.dtype = dtype
        self.wide: dict[int, torch.Tensor] = {}

    def of(self, t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None:
            return None
        if id(t) not in self.wide:
            self.wide[id(t)] = t.detach().to(self.dtype, copy=True).requires_grad_(t.requires_grad)
        return self.wide[id(t)]

    def linear(self, x: torch.Tensor, p: Projection) -> torch.Tensor:
        weight = as_weight(p.weight)
        W = self.of(weight.tensors()[0]) if weight.layout().kind == "dense" else weight.dense(self.dtype)
        y = F.linear(x, W, self.of(p.bias))
        for a in p.adapters:
            dropped = x
            if a.dropout:
                mask = F.dropout(torch.ones_like(x, dtype=a.A.dtype), a.dropout) != 0
                dropped = x * mask / (1 - a.dropout)
            y = y + F.linear(F.linear(dropped, self.of(a.A)), self.of(a.B), self.of(a.bias)) * a.scaling
        return y


def pooled(once: Callable[[], tuple[dict, dict, dict]], draws: int) -> tuple[dict, dict, dict]:
    """(ours, reference, eager) of several draws, each tensor of the one beside the same tensor of the others.

    The largest error of a small tensor is chance; over several draws it says which of two computations is the more
    exact."""
    runs = [once() for _ in range(draws)]
    return tuple({k: torch.stack([run[i][k] for run in runs]) for k in runs[0][i]} for i in range(3))


def judge_gradients(ours: Callable, setup: Callable[[], tuple], formula: Callable, draws: int = 4) -> None:
    """Gradients alone, judged beside the formula in float32 under the same masks.

    setup() -> x, what the function takes besides, and the tensors that take gradients. ours(*setup()) -> their
    gradients, None where there is none. formula(reference, x, besides) -> what torch.autograd.grad differentiates, and
    the upstream gradients or None."""

    def plain(dtype, x, besides, inputs):
        torch.manual_seed(5)
        reference = Reference(dtype)
        outputs, upstream = formula(reference, reference.of(x), besides)
        return torch.autograd.grad(outputs, [reference.of(t) for t in inputs], upstream, allow_unused=True)

    def once():
        group = setup()
        torch.manual_seed(5)
        results = ours(*group), plain(torch.float64, *group), plain(torch.float32, *group)
        assert len({tuple(g is None for g in r) for r in results}) == 1, (
            "a gradient is missing, or there is one too many"
        )
        return tuple({f"d{i}": g for i, g in enumerate(r) if g is not None} for r in results)

    verdict = compare(*pooled(once, draws))
    assert verdict, str(verdict)


def gradients(
    ys: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], dys: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """y and the gradients, by name, detached."""
    grads = torch.autograd.grad(ys, inputs, [dy.to(y.dtype) for y, dy in zip(ys, dys)])
    out = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return out | {f"d{i}": g for i, g in enumerate(grads)}


def quantised_4bit(
    quant_type: str, nested: bool, compute: torch.dtype, blocksize: int = 64
) -> Callable[[nn.Linear], nn.Module]:
    """Makes a bitsandbytes Linear4bit, computing in `compute`, of a linear."""
    import bitsandbytes as bnb

    def convert(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute, nested, quant_type
        )
        weight = bnb.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            compress_statistics=nested,
            quant_type=quant_type,
            blocksize=blocksize,
        )
        layer.weight, layer.bias = weight.to(linear.weight.device), linear.bias
        return layer

    return convert


def quantised_8bit(linear: nn.Linear) -> nn.Module:
    """A bitsandbytes Linear8bitLt of a linear. It quantises where a weight is moved, and only from the CPU."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    weight = bnb.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    layer.weight, layer.bias = weight.to(linear.weight.device), linear.bias
    return layer
