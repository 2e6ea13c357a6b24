"""The experts' function against one expert at a time: layouts, gates, biases, adapters, top-k, empty experts; every
gradient by the judge; what is kept and made; the same bits twice; second derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastft_kernels.experts import routing
from fastft_kernels.experts.gating import Gating
from fastft_kernels.experts.grouped_experts import _form, grouped_experts, grouped_experts_ref
from fastft_kernels.experts.projection import ExpertsAdapter, ExpertsProjection
from fastft_kernels.numerics import compare
from fastft_kernels.runtime.dispatch import INTERPRETED

E, H, N = 5, 24, 16
GATES = {
    "silu": Gating(),
    "interleaved, clamped": Gating("silu", "interleaved", alpha=1.702, limit=1.0, offset=1.0),
    "gelu, up first": Gating("gelu_tanh", "chunk", swapped=True),
    "no gate": Gating("relu2", ""),
    "its own": Gating(function=lambda p: F.mish(p.chunk(2, -1)[0]) * p.chunk(2, -1)[1]),
}


class Case:
    """Tensors of one block in float64, and runs of it in any dtype."""

    def __init__(self, gating=GATES["silu"], *, transposed=False, bias=False, ranks=(), top_k=2, tokens=61, seed=0):
        g = torch.Generator().manual_seed(seed)
        draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
        self.gating, self.transposed, self.bias, self.ranks = gating, transposed, bias, ranks
        p = 2 * N if gating.layout else N
        self.t = {"x": draw(tokens, H), "weights": draw(tokens, top_k).abs()}
        for name, a, b in (("up", H, p), ("down", N, H)):
            self.t[name] = draw(E, a, b) * a**-0.5 if transposed else draw(E, b, a) * a**-0.5
            if bias:
                self.t[f"{name} bias"] = draw(E, b)
            for i, r in enumerate(ranks):
                self.t[f"{name} first {i}"], self.t[f"{name} second {i}"] = draw(E, a, r) * 0.2, draw(E, r, b) * 0.2
        chosen = [e for e in range(E) if e != 1]  # the second is empty
        picks = [torch.randperm(len(chosen), generator=g)[:top_k] for _ in range(tokens)]
        self.index = torch.tensor(chosen)[torch.stack(picks)] if picks else torch.zeros(0, top_k, dtype=torch.long)
        self.dy = draw(tokens, H)

    def projections(self, t):
        def project(name):
            adapters = [
                ExpertsAdapter(t[f"{name} first {i}"], t[f"{name} second {i}"], 0.5 + i) for i in range(len(self.ranks))
            ]
            return ExpertsProjection(t[name], self.transposed, t.get(f"{name} bias"), tuple(adapters))

        return project("up"), project("down")

    def run(self, dtype, reference=False, frozen=()):
        t = {n: v.to(dtype).requires_grad_(not n.startswith(tuple(frozen))) for n, v in self.t.items()}
        return self.outputs(t, reference, dtype)

    def outputs(self, t, reference, dtype):
        up, down = self.projections(t)
        if reference:
            form = _form(t["x"], self.index, t["weights"], up, down, self.gating)
            y = grouped_experts_ref(form, t["x"], self.index, t["weights"], [*up.tensors(), *down.tensors()])
        else:
            y = grouped_experts(t["x"], self.index, t["weights"], up, down, self.gating)
        wanted = {n: v for n, v in t.items() if v.requires_grad}
        grads = torch.autograd.grad(y, list(wanted.values()), self.dy.to(dtype))
        return {"y": y.detach()} | {f"d {n}": g for n, g in zip(wanted, grads)}


LAYOUTS = [
    dict(),
    dict(transposed=True, bias=True),
    dict(ranks=(4,)),
    dict(ranks=(3, 5), transposed=True, bias=True),
]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "transposed, biases", "an adapter", "two adapters"])
def test_formula(gate, layout):
    """In float64 to rounding: values and every gradient."""
    case = Case(GATES[gate], **layout)
    reference = case.run(torch.float64, reference=True)
    for name, ours in case.run(torch.float64).items():
        assert (ours - reference[name]).abs().max() <= 1e-11 * reference[name].abs().max(), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "transposed, biases", "an adapter", "two adapters"])
def test_numerics(layout, dtype):
    case = Case(**layout, tokens=160)
    rounded = Case(**layout, tokens=160)
    rounded.t = {n: v.to(dtype).double() for n, v in rounded.t.items()}
    rounded.dy = rounded.dy.to(dtype).double()
    verdict = compare(case.run(dtype), rounded.run(torch.float64, reference=True), case.run(dtype, reference=True))
    assert verdict, str(verdict)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_few_tokens_and_every_top_k(top_k, tokens):
    case = Case(ranks=(2,), bias=True, top_k=top_k, tokens=tokens)
    reference = case.run(torch.float64, reference=True)
    for name, ours in case.run(torch.float64).items():
        assert (ours - reference[name]).abs().max() <= 1e-11 * max(reference[name].abs().max(), 1), name


def test_no_tokens():
    found = Case(ranks=(2,), bias=True, tokens=0).run(torch.float32)
    assert found["y"].shape == (0, H)
    assert all(bool((g == 0).all()) for g in found.values())


def test_what_is_no_expert_counts_for_nothing():
    """An index past the last expert: its weight is taken for zero, and has no gradient."""
    case, other = Case(bias=True), Case(bias=True)
    case.index[::3, 1] = E + 4
    other.t["weights"][::3, 1] = 0
    found, expected = case.run(torch.float64), other.run(torch.float64)
    assert (found["d weights"][::3, 1] == 0).all()
    expected["d weights"][::3, 1] = 0
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-12, atol=1e-12), name


def test_the_same_bits_twice(dtype):
    case = Case(ranks=(4,), bias=True)
    first, second = case.run(dtype), case.run(dtype)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("frozen", [("up", "down"), ("x", "weights"), ("x", "down")], ids=" ".join)
def test_only_what_is_asked_for(frozen):
    case = Case(ranks=(4,), bias=True)
    whole, part = case.run(torch.float32), case.run(torch.float32, frozen=frozen)
    assert part.keys() == {n for n in whole if n == "y" or not n[2:].startswith(frozen)}
    assert all(torch.equal(part[n], whole[n]) for n in part)


def test_inputs_are_not_changed_and_gradients_keep_their_dtype():
    case = Case(ranks=(4,))
    t = {n: v.to(torch.bfloat16) for n, v in case.t.items()}
    t |= {n: v.float() for n, v in t.items() if "first" in n or "second" in n}
    t["weights"] = t["weights"].float()
    leaves = {n: v.clone().requires_grad_() for n, v in t.items()}
    found = case.outputs(leaves, False, torch.bfloat16)
    assert all(torch.equal(leaves[n], t[n]) for n in t)
    assert all(found[f"d {n}"].dtype == v.dtype for n, v in t.items())


class Largest(TorchDispatchMode):
    """Shapes of three dimensions made inside."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.dim() == 3 and out.untyped_storage().data_ptr() not in given:
            self.shapes.add(tuple(out.shape))
        return out


def test_no_stack_of_matrices_is_made_and_little_is_kept():
    """Frozen experts with an adapter: never W + BA, nor its gradient; kept are x, the first product, the order and the
    low-rank products."""
    case = Case(ranks=(4,), top_k=4, tokens=200)
    t = {n: v.float().requires_grad_("first" in n or "second" in n or n == "x") for n, v in case.t.items()}
    up, down = case.projections(t)
    kept: dict[int, torch.Tensor] = {}
    pack = lambda v: kept.setdefault(v.untyped_storage().data_ptr(), v)
    with Largest() as seen:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            y = grouped_experts(t["x"], case.index, t["weights"], up, down, case.gating)
        y.sum().backward()
    assert not seen.shapes & {(E, H, 2 * N), (E, 2 * N, H), (E, N, H), (E, H, N)}, seen.shapes
    own = {v.untyped_storage().data_ptr() for v in [*t.values(), case.index]}
    rows = case.index.numel()
    most = rows * (2 * N + 4 + 4) * 4 + rows * 8 + 4 * E
    assert sum(v.untyped_storage().nbytes() for k, v in kept.items() if k not in own) <= most


def test_second_derivatives():
    case = Case(ranks=(2,), bias=True, tokens=7)
    t = {n: v.clone().requires_grad_() for n, v in case.t.items()}
    names = list(t)

    def f(*values):
        up, down = case.projections(dict(zip(names, values)))
        return grouped_experts(values[0], case.index, values[1], up, down, case.gating)

    first = torch.autograd.grad(f(*t.values()).square().sum(), t["x"], create_graph=True)[0]
    (ours,) = torch.autograd.grad(first.sum(), t["x"])
    up, down = case.projections(t)
    form = _form(t["x"], case.index, t["weights"], up, down, case.gating)
    y = grouped_experts_ref(form, t["x"], case.index, t["weights"], [*up.tensors(), *down.tensors()])
    expected = torch.autograd.grad(y.square().sum(), t["x"], create_graph=True)[0]
    (expected,) = torch.autograd.grad(expected.sum(), t["x"])
    assert torch.allclose(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_combine(dtype, weighted):
    """The kernel in the interpreter, the reference elsewhere: columns in several blocks, a partial last one."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(21, 2 * routing.BLOCK + 5 if INTERPRETED else 40, generator=g).to(dtype)
    places = torch.stack([torch.randperm(21, generator=g)[:3] for _ in range(7)])
    weights = torch.rand(7, 3, generator=g) if weighted else None
    wide = rows.double()[places] * (1.0 if weights is None else weights.double()[..., None])
    eager = rows[places] * (1.0 if weights is None else weights[..., None])
    ours = routing.combine(rows, places, weights, dtype)
    assert compare({"y": ours}, {"y": wide.sum(1)}, {"y": eager.sum(1).to(dtype)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(index=torch.zeros(3, 2, dtype=torch.long)), "index and weights"),
        (dict(index=torch.zeros(61, 2)), "integer index"),
        (dict(x=torch.zeros(61, H + 1)), "projections"),
    ],
)
def test_refused(change, match):
    case = Case()
    t = {n: v.float() for n, v in case.t.items()}
    given = {"x": t["x"], "index": case.index, "weights": t["weights"]} | change
    with pytest.raises(ValueError, match=f"grouped_experts: want.*{match}"):
        grouped_experts(*given.values(), *case.projections(t), case.gating)
