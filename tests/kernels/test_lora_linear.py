"""lora_linear against PEFT's own layers (eager) and the formula in float64 (reference): y, dx, dA, dB, dW and
biases."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft_kernels.lora.lora_linear import Adapter, Projection, lora_linear
from fastft_kernels.numerics import compare
from fastft_kernels.quant.weights import Float8
from fastft_kernels.recompute.recomputation import Recomputation
from fastft_kernels.runtime.dispatch import INTERPRETED
from tests.kernels.lora_cases import (
    Case,
    Reference,
    autocast,
    build,
    compute_dtype,
    gradients,
    judge_gradients,
    leaves,
    pooled,
    projection_of,
    quantised_4bit,
    quantised_8bit,
    randomise,
)

MODES = ("plain", "wide", "autocast", "autocast fp32")


def judge(case: Case, dtype, device, draws=6):
    model = build(case, dtype, device)
    ours, true, eager = pooled(lambda: once(model, case, dtype, device), draws)
    verdict = compare(ours, true, eager)
    assert verdict, (case, str(verdict))


def once(model, case: Case, dtype, device):
    randomise(model)
    x_dtype = torch.float32 if case.mode == "autocast fp32" else dtype
    x = torch.randn(*case.tokens, case.width, device=device).to(x_dtype).requires_grad_()
    inputs = [x, *leaves(model)]
    dys = [torch.randn(*case.tokens, out, device=device).to(dtype) for out in case.outs]
    projections = [projection_of(layer) for layer in model.layers]

    state = torch.get_rng_state()
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    ours = gradients(lora_linear(x, projections, compute_dtype=compute_dtype(case.mode, dtype)), inputs, dys)
    after = torch.rand(1)
    torch.manual_seed(seed)
    with autocast(case.mode, dtype, device):
        eager = gradients(model(x), inputs, dys)
    assert torch.equal(after, torch.rand(1)), "the random stream stands elsewhere than stock's"
    torch.manual_seed(seed)
    reference = Reference()
    wide = reference.of(x)
    true = gradients([reference.linear(wide, p) for p in projections], [reference.of(t) for t in inputs], dys)
    for name, t in zip([f"d{i}" for i in range(len(inputs))], inputs):
        assert ours[name].dtype == t.dtype
    if case.mode == "autocast fp32":  # stock's result is in autocast's dtype under CUDA, ours everywhere
        ours, eager = ({k: v.to(dtype) if k.startswith("y") else v for k, v in d.items()} for d in (ours, eager))
    torch.set_rng_state(state)
    torch.rand(5)
    return ours, true, eager


def modes_of(dtype):
    if dtype == torch.float32:
        return MODES[:1]
    return MODES[::2] if INTERPRETED else MODES


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_matches_peft(n, dropout, dtype, device):
    for mode in modes_of(dtype):
        judge(Case(outs=(48, 32, 40)[:n], mode=mode, dropout=dropout), dtype, device)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": True},
        {"bias": True, "lora_bias": True},
        {"bias": True, "lora_bias": True, "dropout": 0.2},
        {"adapters": ("default", "second")},
        {"adapters": ("default", "second"), "dropout": 0.4},
        {"rslora": True, "ranks": (4, 16, 1), "alphas": (8, 1, 32)},
        {"bare": (1,)},
        {"bare": (0, 1), "dropout": 0.1},
        {"bare": (0, 1, 2), "trainable_base": True, "bias": True},
        {"trainable_base": True, "bias": True},
    ],
    ids=lambda c: "-".join(c),
)
def test_settings(changes, dtype, device):
    for mode in modes_of(dtype):
        judge(Case(mode=mode, **changes), dtype, device)


@pytest.mark.parametrize("rank", [1, 2, 64, 256])
@pytest.mark.parametrize("tokens", [(1,), (1, 1), (33,), (2, 3, 4)])
def test_ranks_and_shapes(rank, tokens, dtype, device):
    judge(Case(outs=(40, 24), ranks=(rank, rank), alphas=(rank, rank), tokens=tokens), dtype, device)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_4bit_base(quant_type, nested, dtype, device):
    for mode in modes_of(dtype):
        for dropout in (0.0,) if INTERPRETED else (0.0, 0.2):
            base = quantised_4bit(quant_type, nested, dtype)
            judge(Case(mode=mode, base=base, dropout=dropout, bias=nested), dtype, device)


def test_8bit_base(dtype, device):
    for mode in [m for m in modes_of(dtype) if m != "autocast fp32"]:
        judge(Case(mode=mode, base=quantised_8bit, dropout=0.2), dtype, device)


def test_fp8_base(dtype, device):
    """Against the same layer with the expanded weight: the same bits."""
    x, projections, inputs = setup_group(device, dtype)
    quantised, dense = [], []
    for p in projections:
        weight = Float8(p.weight.to(torch.float8_e4m3fn), torch.rand(p.weight.shape[0], 1, device=device))
        quantised.append(Projection(weight, None, p.adapters))
        dense.append(Projection(weight.dense(dtype), None, p.adapters))
    got, want = (torch.autograd.grad(sum(y.sum() for y in lora_linear(x, ps)), inputs) for ps in (quantised, dense))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@settings(
    max_examples=15 if INTERPRETED else 40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@given(data=st.data())
def test_property(data, dtype, device):
    draw = data.draw
    n = draw(st.integers(1, 3))
    # stock's product of rank 1 is one of a matrix and a vector, which some CPUs sum in lanes; the group's is one of
    # matrices there
    smallest = [] if device.type == "cpu" and not INTERPRETED else [1]
    ranks = draw(st.lists(st.sampled_from([*smallest, 2, 3, 8, 17, 64]), min_size=n, max_size=n))
    case = Case(
        outs=draw(st.lists(st.integers(16, 70), min_size=n, max_size=n)),
        width=draw(st.integers(16, 90)),
        tokens=tuple(draw(st.lists(st.integers(4, 7), min_size=1, max_size=2))),
        ranks=ranks,
        alphas=[r * draw(st.sampled_from([0.25, 1.0, 1.7, 2.0, 16.0])) for r in ranks],
        mode=draw(st.sampled_from(modes_of(dtype))),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
        bias=draw(st.booleans()),
        rslora=draw(st.booleans()),
        adapters=draw(st.sampled_from([("default",), ("default", "second")])),
        bare=tuple(draw(st.sets(st.integers(0, n - 1), max_size=n - 1))),
        trainable_base=draw(st.booleans()),
    )
    torch.manual_seed(draw(st.integers(0, 2**20)))
    judge(case, dtype, device)


# autograd


def setup_group(device, dtype=torch.float32, n=3, dropout=0.0, width=16, tokens=(2, 5)):
    x = torch.randn(*tokens, width, device=device, dtype=dtype, requires_grad=True)
    projections = []
    for out in (12, 8, 20)[:n]:
        W = torch.randn(out, width, device=device, dtype=dtype)
        A, B = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in ((4, width), (out, 4)))
        projections.append(Projection(W, None, (Adapter(A, B, 0.5, None, dropout),)))
    return x, projections, [x, *(t for p in projections for t in (p.adapters[0].A, p.adapters[0].B))]


def test_no_grad_builds_no_graph(device):
    x, projections, _ = setup_group(device)
    with torch.no_grad():
        ys = lora_linear(x, projections)
    assert all(y.grad_fn is None and not y.requires_grad for y in ys)
    for y, z in zip(ys, lora_linear(x, projections)):
        assert torch.equal(y, z)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_backward_twice(dropout, device):
    x, projections, inputs = setup_group(device, dropout=dropout)
    loss = sum(y.square().sum() for y in lora_linear(x, projections))
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.rand(3)  # the stream moves on between
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_reverse_order_of_backwards(device):
    x, projections, inputs = setup_group(device, dropout=0.5)
    x2 = torch.randn_like(x).requires_grad_()
    torch.manual_seed(3)
    one = sum(y.square().sum() for y in lora_linear(x, projections))
    two = sum(y.square().sum() for y in lora_linear(x2, projections))
    late = torch.autograd.grad(two, [x2, *inputs[1:]]), torch.autograd.grad(one, inputs)
    torch.manual_seed(3)
    alone = torch.autograd.grad(sum(y.square().sum() for y in lora_linear(x, projections)), inputs)
    other = torch.autograd.grad(sum(y.square().sum() for y in lora_linear(x2, projections)), [x2, *inputs[1:]])
    for a, b in zip((*late[1], *late[0]), (*alone, *other)):
        assert torch.equal(a, b)


def test_the_stream_is_left_alone_by_the_backward(device):
    x, projections, inputs = setup_group(device, dropout=0.5)
    loss = sum(y.square().sum() for y in lora_linear(x, projections))
    torch.manual_seed(11)
    torch.autograd.grad(loss, inputs)
    got = torch.rand(4, device=device)
    torch.manual_seed(11)
    assert torch.equal(got, torch.rand(4, device=device))


def judge_group(ours, setup, loss):
    """loss(ys) -> what is differentiated, and the upstream gradients or None."""
    judge_gradients(ours, setup, lambda reference, x, projections: loss([reference.linear(x, p) for p in projections]))


def of_squares(ys):
    return sum(y.square().sum() for y in ys), None


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_incoming_gradients_of_any_layout(layout, device):
    def upstream(ys):
        g = torch.Generator(device).manual_seed(9)
        draw = lambda *shape: torch.randn(*shape, device=device, generator=g)
        dys = []
        for y in ys:
            if layout == "expanded":
                dy = draw(1, 1, y.shape[-1]).to(y.dtype).expand_as(y)
            elif layout == "transposed":
                dy = draw(*y.shape[::-1]).to(y.dtype).permute(2, 1, 0)
            else:
                dy = draw(*y.shape[:-1], 2 * y.shape[-1]).to(y.dtype)[..., ::2]
            assert not dy.is_contiguous()
            dys.append(dy)
        return ys, dys

    def ours(x, projections, inputs):
        ys, dys = upstream(lora_linear(x, projections))
        return torch.autograd.grad(ys, inputs, dys)

    judge_group(ours, lambda: setup_group(device, dropout=0.5), upstream)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_transposed_input(dropout, device):
    """Its masks are those that stock's dropout of a transposed input draws."""

    def setup():
        x, projections, inputs = setup_group(device, dropout=dropout)
        x = torch.randn(x.shape[-1], 5, 2, device=device).permute(2, 1, 0).requires_grad_()
        return x, projections, [x, *inputs[1:]]

    judge_group(
        lambda x, projections, inputs: torch.autograd.grad(of_squares(lora_linear(x, projections))[0], inputs),
        setup,
        of_squares,
    )


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_each_gradient_alone(dropout, device):
    def ours(x, projections, inputs):
        found = []
        for t in inputs:
            torch.manual_seed(5)
            for other in inputs:
                other.requires_grad_(other is t)
            found += torch.autograd.grad(of_squares(lora_linear(x, projections))[0], [t])
        for t in inputs:
            t.requires_grad_()
        return found

    judge_group(ours, lambda: setup_group(device, dropout=dropout), of_squares)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_unused_outputs(dropout, device):
    def second(ys):
        return ys[1].square().sum(), None

    def ours(x, projections, inputs):
        got = torch.autograd.grad(second(lora_linear(x, projections))[0], inputs, allow_unused=True)
        assert [g is None for g in got] == [False, True, True, False, False, True, True]
        return got

    judge_group(ours, lambda: setup_group(device, dropout=dropout), second)


def test_outputs_may_be_written_into(device):
    x, projections, inputs = setup_group(device)
    want = torch.autograd.grad(sum((2 * y).square().sum() for y in lora_linear(x, projections)), inputs)
    got = torch.autograd.grad(sum(y.mul_(2).square().sum() for y in lora_linear(x, projections)), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_outputs_that_need_no_gradient_say_so(device):
    x, projections, _ = setup_group(device)
    for t in (projections[1].adapters[0].A, projections[1].adapters[0].B):
        t.requires_grad_(False)
    ys = lora_linear(x.detach(), projections)
    assert [y.requires_grad for y in ys] == [True, False, True]


def test_saved_tensor_hooks_may_return_copies(device):
    x, projections, inputs = setup_group(device, dropout=0.5)
    torch.manual_seed(5)
    want = torch.autograd.grad(sum(y.square().sum() for y in lora_linear(x, projections)), inputs)
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
        loss = sum(y.square().sum() for y in lora_linear(x, projections))
    for a, b in zip(torch.autograd.grad(loss, inputs), want):
        assert torch.equal(a, b)


def test_no_tokens(device):
    x, projections, inputs = setup_group(device, tokens=(2, 0))
    ys = lora_linear(x, projections)
    assert [tuple(y.shape) for y in ys] == [(2, 0, 12), (2, 0, 8), (2, 0, 20)]
    grads = torch.autograd.grad(sum(y.sum() for y in ys), inputs)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, inputs))


def test_no_tokens_with_casts(device):
    x, projections, inputs = setup_group(device, tokens=(0,))
    grads = torch.autograd.grad(sum(y.sum() for y in lora_linear(x, projections, compute_dtype=torch.bfloat16)), inputs)
    assert all(g.shape == t.shape and g.dtype == t.dtype and not g.any() for g, t in zip(grads, inputs))


def test_autocast_changes_nothing(device):
    x, projections, inputs = setup_group(device)

    def run():
        ys = lora_linear(x, projections)
        return [*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), inputs)]

    want = run()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want))


def test_shapes_that_do_not_fit(device):
    x, projections, _ = setup_group(device)
    with pytest.raises(ValueError, match="want a weight"):
        lora_linear(x[..., :-1], projections)
    A, B = projections[0].adapters[0].A, projections[1].adapters[0].B
    with pytest.raises(ValueError, match="want A"):
        lora_linear(x, [Projection(projections[0].weight, None, (Adapter(A, B, 1.0),))])


def test_overflow_in_fp16(device):
    """Large A and B with a small scaling, a gradient scaled up as a GradScaler does: finite where stock is finite."""
    torch.manual_seed(0)
    x = torch.randn(4, 32, device=device, dtype=torch.float16)
    W = torch.randn(16, 32, device=device, dtype=torch.float16) / 6
    A = (torch.randn(8, 32, device=device) * 400).requires_grad_()
    B = (torch.randn(16, 8, device=device) * 20).requires_grad_()
    (y,) = lora_linear(x, [Projection(W, None, (Adapter(A, B, 1e-3),))], compute_dtype=torch.float16)
    grads = torch.autograd.grad(y, [A, B], torch.randn_like(y) * 1024)
    assert all(torch.isfinite(t).all() for t in (y, *grads))


# what is saved


def saved_bytes(run) -> int:
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(seen.values())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_saves_x_once_and_xA(dropout, device):
    x, projections, inputs = setup_group(device, dropout=dropout, tokens=(64,))
    parameters = sum(t.numel() * 4 for t in inputs[1:]) + sum(p.weight.numel() * 4 for p in projections)
    assert saved_bytes(lambda: lora_linear(x, projections)) == parameters + 64 * (16 * 4 + 12 * 4)
    half = saved_bytes(lambda: lora_linear(x, projections, compute_dtype=torch.bfloat16))
    assert half == parameters + 64 * (16 * 2 + 12 * 2)


def test_recomputation_replaces_x(device):
    x, projections, inputs = setup_group(device, tokens=(64,))
    source = x.detach() * 2
    recomputation = Recomputation((source,), lambda s: s / 2)
    want = torch.autograd.grad(sum(y.square().sum() for y in lora_linear(x, projections)), inputs)
    kept = []

    def pack(t):
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = sum(y.square().sum() for y in lora_linear(x, projections, recomputation=recomputation)[:3])
    assert source.data_ptr() in kept
    assert x.data_ptr() not in kept
    got = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


# modes of torch


class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operators that are not views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or str(func).startswith(("aten._unsafe_view", "aten.detach", "aten.alias"))):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("n", "forward", "backward"), [(1, 5, 8), (3, 9, 15)])
def test_launch_budget(n, forward, backward, device):
    torch.manual_seed(0)
    model = build(Case(outs=(48, 32, 40)[:n], mode="autocast"), torch.bfloat16, device)
    x = torch.randn(2, 9, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    projections = [projection_of(layer) for layer in model.layers]
    with Ops() as f:
        ys = lora_linear(x, projections, compute_dtype=torch.bfloat16)
    dys = [torch.randn_like(y) for y in ys]
    with Ops() as b:
        torch.autograd.backward(ys, dys)
    assert len(f.names) <= forward, f.names
    assert len(b.names) <= backward, b.names


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for dropout in (0.0, 0.5):
            x, projections, inputs = setup_group("cpu", dropout=dropout)
            grads = torch.autograd.grad(sum(y.sum() for y in lora_linear(x, projections)), inputs)
            assert [g.shape for g in grads] == [t.shape for t in inputs]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_compiles(dropout, compute, device):
    torch._dynamo.reset()
    x, projections, inputs = setup_group(device, dropout=dropout)
    flat = [(p.weight, p.adapters[0].A, p.adapters[0].B) for p in projections]

    def run(x, flat):
        group = [Projection(W, None, (Adapter(A, B, 0.5, None, dropout),)) for W, A, B in flat]
        return sum(y.float().square().sum() for y in lora_linear(x, group, compute_dtype=compute))

    torch.manual_seed(5)
    want = torch.autograd.grad(run(x, flat), inputs)
    torch.manual_seed(5)
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(x, flat), inputs)
    for a, b in zip(got, want):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999
