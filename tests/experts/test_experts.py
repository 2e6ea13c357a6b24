"""Experts swapped against stock: recognised by structure, every gradient, exact undo, what stays stock and why; and
defects planted in the candidate, each caught by the proof."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastft
from benchmarks import tiny
from fastft.experts import layer
from fastft.experts.experts import Experts
from fastft.patching.kind import Candidate
from fastft.proving.float64 import float64_reference
from fastft.swapping.swap import is_fast
from fastft.testing import assert_parity
from fastft_kernels.experts import grouped_experts as kernels
from fastft_kernels.experts.gating import Gating
from fastft_kernels.experts.projection import ExpertsAdapter
from fastft_kernels.numerics import compare

from .moe_models import FAMILIES, build, experts_in, fallbacks, patched, recognise, rows, with_adapters

KERNELS = {
    "qwen3_moe": "grouped_experts(silu)",
    "gpt_oss": "grouped_experts(silu, limit 7, interleaved)",
    "nemotron_h": "grouped_experts(relu2)",
}


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_in_float32(family, way):
    stock = build(family)
    model = with_adapters(stock) if way == "lora" else stock
    fast = patched(model)
    swapped, left = rows(fast)
    assert swapped and not left, left
    assert all(r.kernel.startswith(KERNELS.get(family, "grouped_experts(")) for r in swapped)
    assert_parity(model, fast, tiny.batch(stock))
    assert fallbacks(fast) == {}


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_proven_in_bfloat16(family, way):
    """One module of experts, with its router's weights, beside stock: outputs and every gradient, by the judge."""
    stock = build(family, torch.bfloat16)
    module = experts_in(with_adapters(stock) if way == "lora" else stock)
    found = recognise(module, Experts())
    assert isinstance(found, Candidate), found
    assert (proof := found.prove()).ok, proof.reason
    assert proof.dtype == "bfloat16"


def test_bfloat16_in_a_model_no_worse_than_stock():
    """All gradients as one vector: what is summed in bfloat16 is a draw, tensor by tensor."""
    model = with_adapters(build("qwen3_moe", torch.bfloat16))
    inputs = tiny.batch(model.get_base_model())
    exact = copy.deepcopy(model).double()
    vectors = []
    for m in (patched(model), exact, copy.deepcopy(model)):
        m(**inputs).loss.backward()
        vectors.append(torch.cat([p.grad.double().flatten() for p in m.parameters() if p.grad is not None]))
    ours, reference, eager = vectors
    assert (ours - reference).norm() <= 2 * (eager - reference).norm()


def test_default_implementation():
    """Beside stock's grouped products, which most people train with."""
    stock, inputs = build("qwen3_moe"), tiny.batch(build("qwen3_moe"))
    with float64_reference():
        reference = copy.deepcopy(stock).double()(**inputs).loss.detach()
    stock.set_experts_implementation("grouped_mm")
    fast = patched(stock)
    swapped, left = rows(fast)
    assert swapped and not left
    losses = [{"loss": m(**inputs).loss.detach()} for m in (fast, stock)]
    assert compare(losses[0], {"loss": reference}, losses[1])


class Own(nn.Module):
    """An experts module of nobody's: a gate that no formula here knows, matrices the other way round, weights before
    experts."""

    def __init__(self, gate=lambda g, u: torch.tanh(g) * u.exp().clamp(max=2.0)):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.num_experts, self.gate, self.act_fn = 4, gate, nn.Identity()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 2 * 20, generator=g) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(4, 20, 12, generator=g) * 0.2)

    def _apply_gate(self, p):
        return self.gate(*p.chunk(2, -1))

    def forward(self, hidden_states, routing_weights, experts):
        y = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            token, j = torch.where(experts == e)
            h = self._apply_gate(hidden_states[token] @ self.gate_up_proj[e])
            y.index_add_(0, token, h @ self.down_proj[e] * routing_weights[token, j, None])
        return y


def test_a_gate_of_its_own_is_called_as_it_is():
    found = recognise(Own(), Experts())
    assert isinstance(found, Candidate) and found.kernel == "grouped_experts(its own gate)"
    assert (proof := found.prove()).ok, proof.reason


@pytest.mark.parametrize(
    ("gate", "kernel"),
    [
        (lambda g, u: F.silu(u) * g, "grouped_experts(silu)"),
        (lambda g, u: F.gelu(g, approximate="tanh") * u, "grouped_experts(gelu_tanh)"),
        (lambda g, u: g.relu() * u, "grouped_experts(relu)"),
    ],
)
def test_formulas_found_by_trying(gate, kernel):
    found = recognise(Own(gate), Experts())
    assert isinstance(found, Candidate) and found.kernel == kernel
    assert (proof := found.prove()).ok, proof.reason


def test_a_gate_that_mixes_rows_is_refused_by_the_proof():
    """Called on all experts' rows at once it is another function than on each expert's."""
    found = recognise(Own(lambda g, u: F.silu(g) * (u - u.mean(0))), Experts())
    assert isinstance(found, Candidate)
    assert "another formula" in found.prove().reason


@pytest.mark.parametrize("way", ["full", "lora"])
def test_unpatch_restores_every_bit(way):
    model = build("gpt_oss")
    model = with_adapters(model) if way == "lora" else model
    classes = [type(m) for m in model.modules()]
    dicts = [dict(m.__dict__) for m in model.modules()]
    inputs = tiny.batch(build("gpt_oss"))
    before = model(**inputs).logits
    fastft.patch(model)
    assert any(is_fast(m, layer.KIND) for m in model.modules())
    model(**inputs).loss.backward()
    model.zero_grad()
    fastft.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert [m.__dict__.keys() for m in model.modules()] == [d.keys() for d in dicts]
    assert torch.equal(model(**inputs).logits, before)


def test_the_same_bits_twice():
    model = patched(with_adapters(build("qwen3_moe")))
    inputs = tiny.batch(model.get_base_model())
    runs = []
    for _ in range(2):
        model.zero_grad()
        model(**inputs).loss.backward()
        runs.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_a_4bit_model_says_that_its_experts_are_wide():
    model = build("qwen3_moe", torch.bfloat16)
    model.is_loaded_in_4bit = True  # as bitsandbytes' loader leaves it: linear layers in 4 bits, no 3-D parameter
    fast = fastft.patch(model)
    assert any("Qwen3MoeExperts stays in bfloat16" in n for n in fastft.report(fast).notes)
    model.is_loaded_in_4bit = False
    assert not any("stays in" in n for n in fastft.report(fast).notes)


# planted


def _shifted(t: torch.Tensor) -> torch.Tensor:
    return torch.roll(t, 1, 0)


def test_ranks_paired_with_the_wrong_expert(monkeypatch):
    right = layer.adapter

    def wrong(wrapper, name, transposed):
        found = right(wrapper, name, transposed)
        return ExpertsAdapter(found.first, _shifted(found.second), found.scaling)

    assert "another formula" in _proof(monkeypatch, layer, "adapter", wrong)


def test_ranks_in_the_order_of_experts(monkeypatch):
    """lora_B read as lora_A is: by expert, then rank."""

    def wrong(wrapper, name, transposed):
        A, B, e = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts
        first = A.view(e, -1, A.shape[1]).transpose(1, 2)
        return ExpertsAdapter(first, B.view(B.shape[0], e, -1).permute(1, 2, 0), wrapper.scaling[name])

    assert "another formula" in _proof(monkeypatch, layer, "adapter", wrong)


@pytest.mark.parametrize(
    "wrong", [Gating("gelu"), Gating(swapped=True), Gating(layout="interleaved"), Gating(limit=7.0)], ids=str
)
def test_a_wrong_gate(monkeypatch, wrong):
    from fastft.experts.structure import ExpertsStructure

    assert "another formula" in _proof(monkeypatch, ExpertsStructure, "gating_of", lambda s, module: wrong)


def test_a_dropped_token(monkeypatch):
    right = kernels.combine

    def wrong(rows, places, weights, dtype):
        y = right(rows, places, weights, dtype)
        return y.index_fill(0, torch.tensor([len(y) - 1]), 0.0)

    assert "another formula" in _proof(monkeypatch, kernels, "combine", wrong)


def test_a_router_weight_without_its_gradient(monkeypatch):
    assert "d input" in _proof(
        monkeypatch, kernels, "_weights_gradient", lambda form, routing, weights, *rest: weights * 0
    )


def _proof(monkeypatch, where, name, wrong) -> str:
    """Why the proof of experts with adapters fails under a defect; without it, it does not."""
    found = recognise(experts_in(with_adapters(build("qwen3_moe"))), Experts())
    assert isinstance(found, Candidate) and found.prove().ok
    monkeypatch.setattr(where, name, wrong)
    proof = found.prove()
    assert not proof.ok
    return proof.reason


# what stays stock


class Stacked(nn.Module):
    def __init__(self, experts=4):
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.ones(experts, 16, 48)), nn.Parameter(torch.ones(experts, 24, 16))


def test_other_stacks_stay_stock_and_say_so():
    assert "no forward of hidden states" in recognise(Stacked(), Experts())
    assert recognise(Stacked(experts=1), Experts()) is None
    assert recognise(nn.Linear(3, 3), Experts()) is None


def _parallel(module):
    module._is_expert_parallel = True


def _norm(module):
    module.has_post_expert_norm = True


def _own(module):
    module.scale = nn.Parameter(torch.ones(3))


def _learned(module):
    module.act_fn = nn.PReLU()


@pytest.mark.parametrize(
    ("change", "reason"),
    [(_parallel, "several devices"), (_norm, "a norm after"), (_own, "scale"), (_learned, "a child with parameters")],
)
def test_what_cannot_be_expressed_stays_stock(change, reason):
    module = experts_in(build("qwen3_moe"))
    change(module)
    assert reason in recognise(module, Experts())


def test_without_gradients_stock_answers():
    model = build("qwen3_moe").eval()
    fast, inputs = patched(model).eval(), tiny.batch(model)
    module, stock = experts_in(fast), experts_in(model)
    x, index = torch.randn(5, 64), torch.tensor([[0, 1]] * 5)
    with torch.no_grad():
        assert torch.equal(module(x, index, torch.ones(5, 2)), stock(x, index, torch.ones(5, 2)))
    assert inputs


def test_tracers_and_transforms_go_stock():
    fast = experts_in(patched(build("qwen3_moe")))
    x, index, w = torch.randn(5, 64), torch.tensor([[0, 1]] * 5), torch.ones(5, 2)
    torch.func.grad(lambda x: fast(x, index, w).sum())(x)
    assert sum(fast.__dict__["_fastft"].fallbacks.values()) == 1


@pytest.mark.parametrize("change", ["attribute", "activation", "shard"])
def test_a_change_after_the_patch_is_seen(change):
    fast = experts_in(patched(build("qwen3_moe")))
    if change == "attribute":
        fast._is_expert_parallel = True
    elif change == "activation":
        fast.act_fn = nn.GELU()
    else:  # narrower experts, as a shard of each would be
        up, down = fast.gate_up_proj.data, fast.down_proj.data
        fast.gate_up_proj, fast.down_proj = nn.Parameter(up[:, :-2]), nn.Parameter(down[:, :, :-1])
    fast.config._experts_implementation = "eager"
    fast(torch.randn(5, 64), torch.tensor([[0, 1]] * 5), torch.ones(5, 2))
    assert sum(fast.__dict__["_fastft"].fallbacks.values()) == 1
