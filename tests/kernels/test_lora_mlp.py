"""lora_mlp against PEFT's own layers around stock's formula (eager) and the same in float64 (truth)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastft_kernels._runtime import INTERPRETED
from fastft_kernels.lora_linear import Adapter, Projection
from fastft_kernels.lora_mlp import lora_mlp
from fastft_kernels.numerics import compare
from fastft_kernels.recipe import Recipe
from tests.kernels.lora_cases import (
    Case,
    Truth,
    adapt,
    autocast,
    compute_dtype,
    gradients,
    judge_gradients,
    leaves,
    pooled,
    projection_of,
    randomise,
)
from tests.kernels.test_lora_linear import modes_of

# no relu: its derivative jumps, and near the jump a rounding decides
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class MLP(nn.Module):
    def __init__(self, case: Case, inner: int, act, dtype, device):
        super().__init__()
        width = case.width
        for i, (n_in, n_out) in enumerate([(width, inner), (width, inner), (inner, width)]):
            linear = nn.Linear(n_in, n_out, bias=case.bias).requires_grad_(False).to(device=device, dtype=dtype)
            setattr(self, f"p{i}", case.base(linear))
        self.act = act

    def forward(self, x):
        return self.p2(self.act(self.p0(x)) * self.p1(x))


def judge(case: Case, dtype, device, inner=40, activation="silu", draws=6):
    base = torch.float32 if case.mode == "autocast fp32" else dtype
    model = adapt(MLP(case, inner, ACTIVATIONS[activation], base, device), ["p0", "p1", "p2"], case, dtype)
    ours, true, eager = pooled(lambda: once(model, case, dtype, device, activation), draws)
    verdict = compare(ours, true, eager)
    assert verdict, (case, inner, activation, str(verdict))


def once(model, case: Case, dtype, device, activation):
    randomise(model)
    act, base = ACTIVATIONS[activation], torch.float32 if case.mode == "autocast fp32" else dtype
    x = torch.randn(*case.tokens, case.width, device=device).to(base).requires_grad_()
    inputs, dys = [x, *leaves(model)], [torch.randn(*case.tokens, case.width, device=device).to(dtype)]
    parts = [projection_of(layer) for layer in (model.p0, model.p1, model.p2)]
    state = torch.get_rng_state()
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    ours = gradients([lora_mlp(x, *parts, activation, compute_dtype=compute_dtype(case.mode, dtype))], inputs, dys)
    torch.manual_seed(seed)
    with autocast(case.mode, dtype, device):
        eager = gradients([model(x)], inputs, dys)
    torch.manual_seed(seed)
    truth = Truth()
    wide = truth.of(x)
    y = truth.linear(act(truth.linear(wide, parts[0])) * truth.linear(wide, parts[1]), parts[2])
    true = gradients([y], [truth.of(t) for t in inputs], dys)
    torch.set_rng_state(state)
    torch.rand(5)
    return ours, true, {k: v.to(ours[k].dtype) for k, v in eager.items()}


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_matches_peft(activation, dropout, dtype, device):
    for mode in modes_of(dtype):
        judge(Case(mode=mode, dropout=dropout), dtype, device, activation=activation)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": True, "lora_bias": True},
        {"adapters": ("default", "second"), "dropout": 0.2},
        {"bare": (0,)},
        {"bare": (1,), "dropout": 0.2},
        {"bare": (2,)},
        {"bare": (0, 1)},
        {"bare": (0, 1, 2)},
        {"bare": (0, 1, 2), "trainable_base": True, "bias": True},
        {"trainable_base": True, "bias": True},
        {"tokens": (1,)},
        {"ranks": (1, 64, 16), "rslora": True},
    ],
    ids=lambda c: "-".join(c),
)
def test_settings(changes, dtype, device):
    for mode in modes_of(dtype):  # the fewer tokens, the more draws
        judge(Case(mode=mode, **changes), dtype, device, draws=60 if "tokens" in changes and not INTERPRETED else 6)


@settings(
    max_examples=5 if INTERPRETED else 30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@given(data=st.data())
def test_property(data, dtype, device):
    draw = data.draw
    ranks = draw(st.lists(st.sampled_from([1, 2, 8, 33]), min_size=3, max_size=3))
    case = Case(
        width=draw(st.integers(16, 70)),
        tokens=tuple(draw(st.lists(st.integers(4, 7), min_size=1, max_size=2))),
        ranks=ranks,
        alphas=[r * draw(st.sampled_from([0.25, 1.0, 1.7, 4.0])) for r in ranks],
        mode=draw(st.sampled_from(modes_of(dtype))),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
        bias=draw(st.booleans()),
        bare=tuple(draw(st.sets(st.integers(0, 2), max_size=2))),
        trainable_base=draw(st.booleans()),
    )
    torch.manual_seed(draw(st.integers(0, 2**20)))
    judge(case, dtype, device, inner=draw(st.integers(16, 70)), activation=draw(st.sampled_from(list(ACTIVATIONS))))


def setup_mlp(device, dropout=0.0, tokens=(2, 5), dtype=torch.float32):
    x = torch.randn(*tokens, 16, device=device, dtype=dtype, requires_grad=True)
    parts, inputs = [], [x]
    for n_in, n_out in [(16, 24), (16, 24), (24, 16)]:
        W = torch.randn(n_out, n_in, device=device, dtype=dtype) / 4
        A, B = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in ((4, n_in), (n_out, 4)))
        parts.append(Projection(W, None, (Adapter(A, B, 0.5, None, dropout),)))
        inputs += [A, B]
    return x, parts, inputs


def loss_of(x, parts, **kwargs):
    return lora_mlp(x, *parts, **kwargs).square().sum()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_backward_twice_and_in_reverse(dropout, device):
    x, parts, inputs = setup_mlp(device, dropout)
    torch.manual_seed(1)
    one, two = loss_of(x, parts), loss_of(x * 2, parts)
    b = torch.autograd.grad(two, inputs)
    a = torch.autograd.grad(one, inputs, retain_graph=True)
    again = torch.autograd.grad(one, inputs)
    torch.manual_seed(1)
    alone = torch.autograd.grad(loss_of(x, parts), inputs)
    other = torch.autograd.grad(loss_of(x * 2, parts), inputs)
    for got, want in ((a, alone), (again, alone), (b, other)):
        assert all(torch.equal(g, w) for g, w in zip(got, want))


def silu_mlp(truth, x, parts):
    gate, up = (truth.linear(x, p) for p in parts[:2])
    return truth.linear(F.silu(gate) * up, parts[2]).square().sum(), None


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_each_gradient_alone(dropout, device):
    def ours(x, parts, inputs):
        found = []
        for t in inputs:
            torch.manual_seed(5)
            for other in inputs:
                other.requires_grad_(other is t)
            found += torch.autograd.grad(loss_of(x, parts), [t])
        for t in inputs:
            t.requires_grad_()
        return found

    judge_gradients(ours, lambda: setup_mlp(device, dropout), silu_mlp)


def test_no_grad_and_no_tokens(device):
    x, parts, inputs = setup_mlp(device)
    with torch.no_grad():
        y = lora_mlp(x, *parts)
    assert y.grad_fn is None
    assert torch.equal(y, lora_mlp(x, *parts))
    x, parts, inputs = setup_mlp(device, tokens=(3, 0))
    grads = torch.autograd.grad(lora_mlp(x, *parts).sum(), inputs)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, inputs))


def test_expanded_gradient_and_copying_hooks(device):
    x, parts, inputs = setup_mlp(device, 0.5)
    torch.manual_seed(1)
    want = torch.autograd.grad(lora_mlp(x, *parts), inputs, torch.ones_like(x))
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
        y = lora_mlp(x, *parts)
    got = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_saves_x_gate_up_and_low_rank(device):
    x, parts, inputs = setup_mlp(device, dropout=0.5, tokens=(64,))
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_mlp(x, *parts)
    parameters = sum(t.numel() * 4 for t in inputs[1:]) + sum(p.weight.numel() * 4 for p in parts)
    assert sum(seen.values()) == parameters + 64 * 4 * (16 + 24 + 24 + 12)


def test_saves_the_middle_only_where_it_is_needed(device):
    """The gradient of the last B alone needs the low-rank product: not x, gate or up."""
    x, parts, inputs = setup_mlp(device, tokens=(64,))
    for t in inputs[:-1]:
        t.requires_grad_(False)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape[0]) or t, lambda t: t):
        y = lora_mlp(x, *parts)
    assert sizes.count(64) == 1
    (got,) = torch.autograd.grad(y.sum(), inputs[-1:])
    inputs[0].requires_grad_(True)
    (want,) = torch.autograd.grad(lora_mlp(x, *parts).sum(), inputs[-1:])
    assert torch.equal(got, want)


def test_recipe_replaces_x(device):
    x, parts, inputs = setup_mlp(device)
    source, kept = x.detach() * 2, []
    want = torch.autograd.grad(loss_of(x, parts), inputs)

    def pack(t):
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = lora_mlp(x, *parts, recipe=Recipe((source,), lambda s: s / 2))
    assert source.data_ptr() in kept
    assert x.data_ptr() not in kept
    got = torch.autograd.grad(y.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_the_output_may_be_written_into(device):
    x, parts, inputs = setup_mlp(device)
    want = torch.autograd.grad((2 * lora_mlp(x, *parts)).square().sum(), inputs)
    got = torch.autograd.grad(lora_mlp(x, *parts).mul_(2).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_glu_options(device):
    def ours(x, parts, inputs):
        return torch.autograd.grad(loss_of(x, parts, activation="swiglu_oai", limit=0.7, up_offset=1.0), inputs)

    def formula(truth, x, parts):
        g, u = (truth.linear(x, p) for p in parts[:2])
        g, u = g.clamp(max=0.7), u.clamp(-0.7, 0.7)
        return truth.linear(g * torch.sigmoid(1.702 * g) * (u + 1), parts[2]).square().sum(), None

    judge_gradients(ours, lambda: setup_mlp(device), formula)


def test_shapes_that_do_not_fit(device):
    x, parts, _ = setup_mlp(device)
    with pytest.raises(ValueError, match="one width"):
        lora_mlp(x, parts[0], Projection(torch.randn(20, 16, device=device)), parts[2])


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, parts, inputs = setup_mlp("cpu", 0.5)
        grads = torch.autograd.grad(loss_of(x, parts), inputs)
        assert [g.shape for g in grads] == [t.shape for t in inputs]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles(dropout, device):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, flat):
        return lora_mlp(x, *(Projection(W, None, (Adapter(A, B, 0.5, None, dropout),)) for W, A, B in flat)).square().sum()

    def ours(x, parts, inputs):
        flat = [(p.weight, p.adapters[0].A, p.adapters[0].B) for p in parts]
        return torch.autograd.grad(run(x, flat), inputs)

    judge_gradients(ours, lambda: setup_mlp(device, dropout), silu_mlp)
