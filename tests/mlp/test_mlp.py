"""Which MLPs are recognised, as what; which are refused, and the reason given; a model of unknown code is stock where
nothing is proven."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastft
from benchmarks.models import one_way
from fastft.experts.experts import Experts
from fastft.mlp.recogniser import MLPs
from fastft.patching.kind import Candidate, Context
from fastft.patching.observe import ModuleCall, Observation
from fastft.swapping.swap import is_fast
from fastft_kernels.numerics import compare

WIDTH, INNER = 16, 24


class Gated(nn.Module):
    """swapped: up comes first. limit: clamps, as some models do."""

    def __init__(self, act=F.silu, *, swapped=False, limit=None):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER)
        self.three = nn.Linear(INNER, WIDTH)
        self.act, self.swapped, self.limit = act, swapped, limit

    def forward(self, x):
        a, b = self.one(x), self.two(x)
        gate, up = (b, a) if self.swapped else (a, b)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.three(self.act(gate) * up)


class Fused(nn.Module):
    def __init__(self, interleaved=False):
        super().__init__()
        self.gate_up, self.down, self.interleaved = nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, WIDTH), interleaved

    def forward(self, x):
        h = self.gate_up(x)
        gate, up = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Plain(nn.Module):
    def __init__(self, act=F.gelu):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), act

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Residual(Plain):
    def forward(self, x, residual):
        return super().forward(x) + residual


class Scaled(Plain):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Learned(Plain):
    def __init__(self):
        super().__init__(nn.PReLU())


class Own(Plain):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return super().forward(x * self.mix)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, position=None):
        q, v = self.qkv(x).chunk(2, -1)
        return self.out(torch.softmax(q * position[0], -1) * v)


def recognise(module, kind=MLPs, tensors=1):
    seen = Observation()
    seen.calls[module] = [ModuleCall(0, None, [torch.empty(1, 2, WIDTH, device="meta")] * tensors, None, tensors)]
    return kind().recognise(module, Context(module, seen, {module: "mlp"}))


@pytest.mark.parametrize(
    ("module", "kernel"),
    [
        (Gated(), "glu(silu)"),
        (Gated(swapped=True), "glu(silu)"),
        (Gated(F.gelu), "glu(gelu)"),
        (Gated(lambda x: F.gelu(x, approximate="tanh")), "glu(gelu_tanh)"),
        (Gated(limit=7.0), "glu(silu, limit 7)"),
        (Fused(), "glu(silu, chunk gate_up)"),
        (Fused(interleaved=True), "glu(silu, interleaved gate_up)"),
        (Plain(), "activation(gelu)"),
        (Plain(lambda x: F.relu(x).square()), "activation(relu2)"),
    ],
)
def test_recognised_and_proven(module, kernel):
    found = recognise(module)
    assert isinstance(found, Candidate), found
    assert found.kernel == kernel
    assert (proof := found.prove()).ok, proof.reason


@pytest.mark.parametrize(
    ("module", "tensors", "reason"),
    [
        (Plain(torch.tanh), 1, "no activation known here"),
        (Scaled(), 1, "it does not return its last product"),
        (Residual(), 2, "it takes more than one tensor"),
        (Learned(), 1, "beside its linear layers it has a PReLU with parameters"),
        (Own(), 1, "it has a parameter of its own (mix)"),
    ],
)
def test_refused_with_a_reason(module, tensors, reason):
    found = recognise(module, tensors=tensors)
    assert isinstance(found, str)
    assert found.startswith(reason)


@pytest.mark.parametrize("module", [Attention(), nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4)), nn.Bilinear(4, 4, 4)])
def test_no_mlp_at_all(module):
    assert recognise(module, tensors=2) is None


class Layer(nn.Module):
    """A decoder layer with its MLP written out, and more than an MLP."""

    def __init__(self, act):
        super().__init__()
        self.attention, self.fc1, self.act, self.fc2 = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, INNER),
            act,
            nn.Linear(INNER, WIDTH),
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, residual=0.0):
        x = x + self.attention(x)
        return x + self.fc2(self.act(self.fc1(self.norm(x)))) + residual


@pytest.mark.parametrize(
    ("act", "kernel"),
    [(nn.GELU(), "activation(gelu)"), (nn.ReLU(), "activation(relu)"), (nn.SiLU(), "activation(silu)")],
)
def test_an_activation_inside_a_layer_is_swapped_alone(act, kernel):
    layer = Layer(act)
    context = Context(layer, Observation(), {m: n for n, m in layer.named_modules()})
    assert MLPs().recognise(layer, context) is None
    found = MLPs().recognise(layer.act, context)
    assert isinstance(found, Candidate), found
    assert found.kernel == kernel
    assert (proof := found.prove()).ok, proof.reason
    x = torch.randn(2, WIDTH)
    before = layer(x)
    found.apply(layer.act)
    torch.testing.assert_close(layer(x), before)


class Router(nn.Module):
    """One width throughout, and one activation called twice."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(WIDTH), nn.GELU()
        self.fc1, self.fc2, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.out(self.act(self.fc2(self.act(self.fc1(self.norm(x))))))


def test_an_activation_between_layers_of_one_width_is_swapped_alone():
    router = Router()
    context = Context(router, Observation(), {m: n for n, m in router.named_modules()})
    assert MLPs().recognise(router, context) is None
    found = MLPs().recognise(router.act, context)
    assert isinstance(found, Candidate) and found.kernel == "activation(gelu)" and found.prove().ok
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    stock, reference = router(x), Router()
    reference.load_state_dict(router.state_dict())
    found.apply(router.act)
    assert compare(router(x), reference.double()(x.double()), stock) and is_fast(router.act, "mlp")


@pytest.mark.parametrize("act", [nn.Tanh(), nn.Dropout(0.0), nn.ReLU(inplace=True), nn.Softmax(-1), nn.PReLU()])
def test_another_leaf_inside_a_layer_is_left(act):
    layer = Layer(act)
    context = Context(layer, Observation(), {m: n for n, m in layer.named_modules()})
    assert MLPs().recognise(layer.act, context) is None

    assert recognise(nn.Conv1d(4, 4, 3), Experts) is None


class Halved(nn.Module):
    """No norm: half of its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.weight * x / (x.abs().amax(-1, keepdim=True) + 1.0)


class Unknown(nn.Module):
    """Code that nobody here has seen: one part that is known by structure, the rest is its own."""

    def __init__(self):
        super().__init__()
        self.words, self.halved, self.norm = nn.Embedding(40, WIDTH), Halved(), nn.LayerNorm(WIDTH)
        self.odd, self.mlp, self.out = Plain(torch.tanh), Gated(), nn.Linear(WIDTH, 40)

    def forward(self, input_ids, labels=None):
        h = self.words(input_ids)
        h = h + self.odd(self.halved(h)) + torch.cumsum(h, 1)
        logits = self.out(h + self.mlp(self.norm(h)))
        return SimpleNamespace(
            loss=F.cross_entropy(logits.flatten(0, 1), (input_ids if labels is None else labels).flatten())
        )


def test_a_model_of_unknown_code():
    torch.manual_seed(0)
    model = Unknown()
    ids = torch.randint(0, 40, (2, 7))
    found = one_way(copy.deepcopy(model), {"input_ids": ids, "labels": ids}, lambda out: out.loss)
    assert found["bad"] == []
    assert found["problems"] == []
    report = fastft.report(fastft.patch(model))
    assert {r.group for r in report.swapped} >= {"LayerNorm", "Gated"}
    stock = {r.group: r.reason for r in report.stock}
    assert stock["Plain"].startswith("no activation known")
    assert all(stock.values())
    assert not {"Halved", "Unknown", "Embedding"} & {r.group for r in report.swapped}
