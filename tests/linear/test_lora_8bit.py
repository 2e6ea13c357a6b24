"""8-bit bases are stock's business, and the report says so: their products quantise the input, so x W^T with a
dequantised W is not exact."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import fastft
from fastft_kernels.quant.int8 import dequantize_e4m3, dequantize_int8
from tests.kernels.lora_cases import quantised_8bit
from tests.linear.lora_models import (
    HIDDEN,
    adapted,
    fallbacks,
    in_float64,
    judge,
    llama,
    run,
    same_bits,
    tokens,
    train_step,
)

E4M3 = torch.float8_e4m3fn
BLOCK = (16, 16)


class Fp8Linear(nn.Linear):
    """A stand-in for a loader's FP8 layer: block scales beside the weight, an input rounded to FP8 row by row on its
    way in."""

    def forward(self, x):
        if x.dtype == torch.float64:
            return nn.functional.linear(
                x, dequantize_e4m3(self.weight, self.weight_scale_inv, torch.float32, BLOCK).double(), self.bias
            )
        scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-6) / torch.finfo(E4M3).max
        rounded = (x.detach() / scale).to(E4M3).to(x.dtype) * scale
        return nn.functional.linear(
            x + (rounded - x).detach(), dequantize_e4m3(self.weight, self.weight_scale_inv, x.dtype, BLOCK), self.bias
        )


def fp8(linear, cls=Fp8Linear):
    bias = {} if cls is Fp8Linear else {"block_size": BLOCK}
    new = cls(linear.in_features, linear.out_features, **(bias or {"bias": False}))
    blocks = linear.weight.data.unfold(0, BLOCK[0], BLOCK[0]).unfold(1, BLOCK[1], BLOCK[1])
    scale = blocks.abs().amax((-1, -2)) / torch.finfo(E4M3).max
    full = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    new.weight = nn.Parameter((linear.weight.data / full).to(E4M3), requires_grad=False)
    new.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    return new


def converted(convert, dtype=torch.float32, skip=()):
    model = llama(dtype)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear and name not in ("lm_head", *skip):
                parent._modules[name] = convert(child)
    model.is_loaded_in_8bit = convert is quantised_8bit
    return model


def true(model):
    """The model in float64, int8 weights as the matrices they stand for; FP8 weights and their scales are exact as they
    are."""
    kept = {n: p.data for n, p in model.named_parameters() if p.dtype == E4M3 or n.endswith("scale_inv")}
    model = in_float64(model)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is bnb.nn.Linear8bitLt:
                weight = child.state if child.weight.CB is None else child.weight
                parent._modules[name] = new = nn.Linear(
                    child.in_features, child.out_features, False, dtype=torch.float64
                )
                new.weight.data = dequantize_int8(weight.CB.to(torch.int8), weight.SCB.float(), torch.float32).double()
                new.weight.requires_grad_(False)
    for n, data in kept.items():
        model.get_parameter(n).data = data
    return model


def stopped_early(model):
    return [n for n in fastft.report(model).notes if n.startswith("observation")]


def evaluate(model):
    model.eval()
    with torch.no_grad():
        logits = model(tokens()).logits
    model.train()
    return {"logits": logits}


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def layer_step(model):
    layer = model.get_submodule(LAYER)
    x = (
        torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3))
        .to(layer.lora_A["default"].weight.dtype)
        .requires_grad_()
    )
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return {
        "y": y,
        "d x": x.grad,
        "d A": layer.lora_A["default"].weight.grad,
        "d B": layer.lora_B["default"].weight.grad,
    }


REASONS = {"int8": "8-bit base: its products quantise the input", "fp8": "its base layer is a Fp8Linear"}
CONVERT = {"int8": quantised_8bit, "fp8": fp8}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")  # bitsandbytes 0.49 says it by a warning
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CONVERT)
def test_the_result_is_stocks(kind, dtype):
    """A layer's bits, a model's step and evaluation; 14 layers in the report, and no fallback, as nothing of them was
    swapped."""
    make = lambda: adapted(converted(CONVERT[kind], dtype))
    stock, ours = make(), fastft.patch(make())
    rows = [r for r in fastft.report(ours) if r.kind == "linear group"]
    assert [(r.count, r.is_swapped, r.reason) for r in rows] == [(14, False, REASONS[kind])]
    reference = true(stock)
    judge(run(ours, train_step), run(reference, train_step, reference=True), run(stock, train_step))
    judge(run(ours, evaluate), run(reference, evaluate, reference=True), run(stock, evaluate))
    assert not fallbacks(ours)
    for m in (ours, stock):
        m.zero_grad(set_to_none=True)
    same_bits(run(ours, layer_step), run(stock, layer_step))


@pytest.mark.parametrize("kind", CONVERT)
def test_a_dense_sibling_is_fast(kind):
    """What a loader did not convert forms groups without the others."""
    make = lambda: adapted(converted(CONVERT[kind], skip=("k_proj", "v_proj", "up_proj")))
    stock, ours = make(), fastft.patch(make())
    judge(run(ours, train_step), run(true(stock), train_step, reference=True), run(stock, train_step))
    rows = {(r.kernel, r.reason): r.count for r in fastft.report(ours) if r.kind == "linear group"}
    assert rows == {("lora_linear(group of 2)", ""): 4, ("lora_linear(group of 1)", ""): 2, ("", REASONS[kind]): 8}
    assert not fallbacks(ours)


@pytest.mark.parametrize("kind", CONVERT)
def test_patched_bare_then_wrapped(kind):
    """The layers are in the report before there is an adapter, and stay stock with one."""
    ours = fastft.patch(converted(CONVERT[kind]))
    assert sum(r.count for r in fastft.report(ours).stock) == 14 and not stopped_early(ours)
    ours, stock = adapted(ours), adapted(converted(CONVERT[kind]))
    judge(run(ours, train_step), run(true(stock), train_step, reference=True), run(stock, train_step))
    assert sum(r.count for r in fastft.report(ours).stock) == 14


def test_transformers_own_fp8_layer():
    """Where its kernel is missing, stock's error is the answer."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    make = lambda: adapted(converted(lambda linear: fp8(linear, FP8Linear)))
    stock, ours = make(), fastft.patch(make())
    rows = [(r.count, r.reason) for r in fastft.report(ours) if r.kind == "linear group"]
    assert rows == [(14, "its base layer is a FP8Linear")]
    errors = []
    for model in (stock, ours):
        with pytest.raises(Exception, match="finegrained-fp8") as e:
            train_step(model)
        errors.append((e.type, str(e.value)))
    assert errors[0] == errors[1]
    bare = fastft.patch(converted(lambda linear: fp8(linear, FP8Linear)))
    assert sum(r.count for r in fastft.report(bare).stock) == 14 and not stopped_early(bare)
