"""FP8 bases in models: the layer is an nn.Linear to everybody, the proof holds groups to the specification, and what is
asked for by nobody changes nothing."""

import copy
import io

import pytest
import torch
from peft.tuners.lora import layer as peft_layer
from torch import nn

import fastft
from fastft.errors import QuantizationError
from fastft.linear.float8_linear import SCALE, Float8Linear
from fastft.mlp import mlp
from fastft.norm import recogniser
from fastft.proving.proof_cache import CACHE
from fastft.swapping.swap import is_fast, state_of
from fastft_kernels.lora import group
from fastft_kernels.quant import scaled_product
from fastft_kernels.quant.int8 import dequantize_e4m3
from fastft_kernels.recompute.recomputation import ASKED
from tests.linear.lora_models import adapted, fallbacks, llama, run, same_bits, tokens, train_step

E4M3 = torch.float8_e4m3fn


def float8(dtype=torch.float32, block=None, products="both", skip=(), **config):
    model = llama(dtype, **config)
    head = model.get_output_embeddings()
    for name, m in model.named_modules():
        if type(m) is nn.Linear and m is not head and not name.endswith(tuple(skip) or "-"):
            Float8Linear.of(m, block, products)
    return model


def rows(model):
    return [r for r in fastft.report(model) if r.kind == "linear group"]


def layer(dtype=torch.float32, block=None, **more):
    linear = nn.Linear(64, 48, dtype=dtype)
    return Float8Linear.of(linear, block, **more), linear


def test_it_is_a_linear_layer():
    linear = nn.Linear(64, 48)
    w, b = linear.weight.data.clone(), linear.bias
    made = Float8Linear.of(linear)
    assert made is linear and isinstance(made, nn.Linear) and made.bias is b
    assert list(made.state_dict()) == ["weight", "bias", SCALE]
    assert made.weight.dtype == E4M3 and made.weight_scale_inv.shape == (48, 1)
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["bias"]
    error = dequantize_e4m3(made.weight.data, made.weight_scale_inv, torch.float32) - w
    assert error.abs().max() < w.abs().max() / 16
    x = torch.randn(5, 64)
    y = made(x)
    assert (y - nn.functional.linear(x, w, b)).norm() < 0.08 * y.norm()
    memory = io.BytesIO()
    torch.save(made, memory)
    memory.seek(0)
    again = torch.load(memory, weights_only=False)
    empty = Float8Linear.of(nn.Linear(64, 48))
    empty.load_state_dict(made.state_dict())
    for other in (copy.deepcopy(made), again, empty):
        assert torch.equal(other(x), y)


def test_casts_leave_its_weight():
    made, _ = layer()
    q, scale = made.weight.data.clone(), made.weight_scale_inv.data.clone()
    for cast, dtype in (
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.float(), torch.float32),
    ):
        model = cast(nn.Sequential(made))
        assert torch.equal(model[0].weight.view(torch.uint8), q.view(torch.uint8))
        assert model[0].weight_scale_inv.dtype == torch.float32 and torch.equal(made.weight_scale_inv, scale)
        assert made.bias.dtype == made.compute_dtype == dtype
        assert made(torch.randn(2, 64, dtype=dtype)).dtype == dtype
    assert made.to("meta").weight.is_meta


def test_what_it_refuses():
    made, _ = layer()
    for linear in (made, nn.Identity()):
        with pytest.raises(TypeError, match=r"want an nn\.Linear that is not patched"):
            Float8Linear.of(linear)
    with pytest.raises(ValueError, match="want products in"):
        Float8Linear.of(nn.Linear(4, 4), None, "backward")
    made.requires_grad_(True)
    with pytest.raises(RuntimeError, match="an FP8 weight is frozen"):
        made(torch.randn(2, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups(dtype):
    """PEFT's plain LoRA layers around it, with adapters in float32; all in groups, each proven against the
    specification; the report says what is lost; the unpatched model is what it was."""
    model = adapted(float8(dtype))
    units = [m for m in model.modules() if type(m) is peft_layer.Linear]
    assert len(units) == 14 and all(type(u.base_layer) is Float8Linear for u in units)
    assert {a.weight.dtype for u in units for a in (*u.lora_A.values(), *u.lora_B.values())} == {torch.float32}
    before = run(model, train_step)
    model.zero_grad(set_to_none=True)
    fastft.patch(model)
    assert sum(r.count for r in rows(model) if r.is_swapped) == 14
    for r in rows(model):
        assert r.dtype == str(dtype).removeprefix("torch.")
        assert r.error <= 2 * r.stock_error + torch.finfo(dtype).eps
        assert "FP8 forward and backward; rms error" in r.reason and "bf16" in r.reason and "NF4" in r.reason
    results = run(model, train_step)
    assert results.keys() == before.keys() and not fallbacks(model)
    assert (results["loss"] - before["loss"]).abs() < (1e-4 if dtype == torch.float32 else 2e-2)
    model.zero_grad(set_to_none=True)
    fastft.unpatch(model)
    same_bits(run(model, train_step), before)


def test_the_errors_shown_are_ordered():
    """bf16 loses the least, NF4 the most; a dense backward loses what bf16 does but for the weight's rounding."""
    shown = {}
    for products in ("both", "forward"):
        model = fastft.patch(adapted(float8(torch.bfloat16, products=products, layers=1)))
        text = rows(model)[0].reason.rpartition("numbers: ")[2]
        shown[products] = {part.split()[0]: tuple(map(float, part.split()[1:])) for part in text.split(", ")}
    both, forward = shown["both"], shown["forward"]
    for i in range(2):
        assert both["bf16"][i] < 0.2 * both["FP8"][i] < both["FP8"][i] < both["NF4"][i]
    assert both["FP8"][0] == forward["FP8"][0] and forward["FP8"][1] < 0.9 * both["FP8"][1]
    assert 0.02 < both["FP8"][0] < 0.05  # two operands of 3 bits each: 2 ** -4 / sqrt(3) * sqrt(2), and less near 448


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (dict(block=(128, 128)), "its scales are those of blocks of 128 x 128"),
        (dict(intermediate_size=40), "its shape (40, 64) is no multiple of 16"),
    ],
    ids=["blocks", "no multiple of 16"],
)
def test_dense_products_say_so(made, why):
    """As exact as stock's own product with the same matrix."""
    model = fastft.patch(adapted(float8(torch.float32, **made)))
    found = rows(model)
    assert sum(r.count for r in found if r.is_swapped) == 14 and not [r for r in found if not r.is_swapped]
    assert any(f"made dense for its products ({why})" in r.reason for r in found)


def test_a_dense_sibling():
    model = fastft.patch(adapted(float8(torch.float32, skip=("k_proj",))))
    assert sum(r.count for r in rows(model) if r.is_swapped) == 14
    assert [r.count for r in rows(model) if "group of 3" in r.kernel] == [6]


DEFECTS = {
    "the weight's scales are left out of dy": ("quantized", lambda real: lambda x, columns=None: real(x)),
    "another matrix than the transposed": ("transpose_8bit", lambda real: lambda q, out=None: real(q).flip(0)),
    "the input is not what was rounded": ("product", lambda real: lambda x, *a: real(x._replace(q=x.q.flip(0)), *a)),
}


@pytest.mark.parametrize("what", DEFECTS)
def test_a_defect_fails_the_proof(what, monkeypatch):
    name, wrong = DEFECTS[what]
    monkeypatch.setattr(scaled_product, name, wrong(getattr(scaled_product, name)))
    known = {key: CACHE.pop(key) for key in list(CACHE) if key[0] == "linear group"}
    try:
        model = fastft.patch(adapted(float8(torch.bfloat16, layers=1)))
    finally:
        for key in [key for key in CACHE if key[0] == "linear group"]:
            del CACHE[key]
        CACHE.update(known)
    assert not any(r.is_swapped for r in rows(model))


@pytest.mark.parametrize("fast", [False, True])
def test_it_learns(fast):
    model = adapted(float8(torch.float32))
    model = fastft.patch(model) if fast else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_a_weight_that_is_to_learn_goes_the_stock_way():
    """Its error, which says that it cannot."""
    model = fastft.patch(adapted(float8(torch.float32, layers=1)))
    model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="an FP8 weight is frozen"):
        train_step(model)


def counted(model, steps, monkeypatch):
    """Each step's loss and gradients, and how many inputs were rounded by a launch of their own."""
    real, calls, found = scaled_product.quantized, [], []
    monkeypatch.setattr(scaled_product, "quantized", lambda x, columns=None: calls.append(columns) or real(x, columns))
    for _ in range(steps):
        calls.clear()
        model.zero_grad(set_to_none=True)
        results = train_step(model)
        found.append((results, sum(c is None for c in calls)))
    monkeypatch.setattr(scaled_product, "quantized", real)
    return found


def test_what_made_the_input_rounds_it(monkeypatch):
    """From the second step on, to the same bits; of an input that changed since, or that nobody multiplies in FP8 any
    more, nothing is taken or made. (Adapters are in the weights' dtype: otherwise the input is narrowed first.)"""
    model = adapted(float8(torch.bfloat16)).bfloat16()
    apart = copy.deepcopy(model)
    fastft.patch(model)
    fused = counted(model, 3, monkeypatch)
    monkeypatch.setattr(group, "take_rounded", lambda source: None)
    separate = counted(fastft.patch(apart), 3, monkeypatch)
    for (mine, _), (theirs, _) in zip(fused, separate):
        same_bits(mine, theirs)
    # two layers of q k v, o, gate up, down; q's first input needs no gradient, and nobody makes o's
    assert [n for _, n in separate] == [8, 8, 8] and [n for _, n in fused] == [8, 3, 3]
    states = [state_of(m, "norm") for m in model.modules() if is_fast(m, "norm")]
    assert sorted(s.asked for s in states).count(ASKED) >= 3
    with model.disable_adapter():
        for _ in range(3):
            train = model(input_ids=tokens(), labels=tokens())
        assert all(s.asked == 0 for s in states), train.loss


def test_an_input_that_was_changed_is_rounded_anew(monkeypatch):
    model = fastft.patch(adapted(float8(torch.bfloat16)).bfloat16())
    norm = model.get_submodule("base_model.model.model.layers.1.post_attention_layernorm")
    train_step(model)
    model.zero_grad(set_to_none=True)
    norm.register_forward_hook(lambda module, args, y: y.mul_(2))
    with_hook, (again, _) = counted(model, 2, monkeypatch)
    monkeypatch.setattr(group, "take_rounded", lambda source: None)
    ((separate, _),) = counted(model, 1, monkeypatch)
    same_bits(with_hook[0], separate)
    same_bits(again, separate)


@pytest.mark.parametrize(
    ("kind", "module", "name", "wrong"),
    [
        ("norm", recogniser, "run_rounded", lambda real, *a: (*real(*a)[:3], 2 * real(*a)[3])),
        ("mlp", mlp, "run_rounded", lambda real, *a: (*real(*a)[:2], 2 * real(*a)[2])),
    ],
    ids=["norm", "mlp"],
)
def test_what_rounds_to_other_bits_is_not_swapped(kind, module, name, wrong, monkeypatch):
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a: wrong(real, *a))
    known = {key: CACHE.pop(key) for key in list(CACHE) if key[0] == kind}
    try:
        model = fastft.patch(adapted(float8(torch.bfloat16, layers=1)))
    finally:
        for key in [key for key in CACHE if key[0] == kind]:
            del CACHE[key]
        CACHE.update(known)
    found = [r for r in fastft.report(model) if r.kind == kind]
    assert any(not r.is_swapped and "rounds to other bits" in r.reason for r in found)


def test_a_model_without_fp8_is_never_asked_to_round(monkeypatch):
    """Nor is it proven there: a fault in what it does not use takes no swap away."""
    known = dict(CACHE)
    CACHE.clear()

    def fail(*args):
        raise AssertionError("rounded")

    monkeypatch.setattr(recogniser, "run_rounded", fail)
    monkeypatch.setattr(mlp, "run_rounded", fail)
    try:
        model = fastft.patch(adapted(llama(torch.bfloat16, layers=1)))
    finally:
        CACHE.clear()
        CACHE.update(known)
    assert {"norm", "mlp"} <= {r.kind for r in fastft.report(model) if r.is_swapped}
    for _ in range(3):
        train_step(model)


def test_a_merge_is_refused():
    """In one line with the fix, and before anything is changed; on a plain base adapters merge as they do."""
    model = fastft.patch(adapted(float8(torch.bfloat16, layers=1)))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(QuantizationError, match="fastft export ADAPTER --to merged --base-precision fp8"):
            merge()
    assert all(torch.equal(t.view(torch.uint8), before[n].view(torch.uint8)) for n, t in model.state_dict().items())
    assert not any(m.merged for m in model.modules() if type(m).__name__ == "Linear" and hasattr(m, "merged"))
    assert rows(model)[0].is_swapped and not fallbacks(model)
    plain = adapted(llama(torch.bfloat16, layers=1))
    assert isinstance(fastft.patch(plain).merge_and_unload(), nn.Module)
