"""Layers that are alike are observed, recognised and proven once: what stands on each is what stood there when every
layer was looked at, and what is not alike is looked at by itself."""

import copy

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import fastft
from benchmarks import host_calls
from fastft.patching import observe as observation
from fastft.patching.twins import Twins, find_twins, hollow
from fastft.proving import proof_cache
from fastft.swapping.swap import slot_of
from tests.linear.lora_models import BASES, adapted, llama, quantised, train_step

SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=48,
    pad_token_id=0,
)


def gemma2():
    """Attention in a window and over the whole row take turns."""
    return adapted(Gemma2ForCausalLM(Gemma2Config(**SMALL, num_hidden_layers=4, sliding_window=4)))


def experts():
    more = dict(
        num_hidden_layers=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0]
    )
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **more))


class Branches(nn.Module):
    """A layer with a list of MLPs."""

    def __init__(self, config):
        super().__init__()
        self.branches = nn.ModuleList(LlamaMLP(config) for _ in range(3))

    def forward(self, x):
        return x + sum(branch(x) for branch in self.branches)


class Nested(nn.Module):
    """Layers that are alike, of parts that are alike."""

    def __init__(self):
        super().__init__()
        config = LlamaConfig(**SMALL)
        self.layers = nn.ModuleList(Branches(config) for _ in range(3))

    def forward(self, input_ids):
        x = input_ids[..., None].expand(-1, -1, 32).to(self.layers[0].branches[0].up_proj.weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return x


MODELS = {
    "nested": Nested,
    "dense": lambda: adapted(llama(layers=4)),
    "nf4": lambda: BASES["nf4"](config={"layers": 4}),
    "gemma2": gemma2,
    "experts": experts,
}


def standing(model):
    """What stands on every module: class, mixins, the members of its linear groups; and the report."""
    names = {m: n for n, m in model.named_modules()}
    found = {}
    for name, module in model.named_modules():
        slot = slot_of(module)
        parts = {} if slot is None else {k: (mixin.__name__, state) for k, (mixin, state) in slot.parts.items()}
        groups = [g for _, state in parts.values() for g, _, _ in getattr(state, "groups", ())]
        groups += [state for _, state in parts.values() if hasattr(state, "refs")]
        members = [tuple(names[m] for m in g.members) for g in groups]
        found[name] = type(module).__name__, sorted((k, mixin) for k, (mixin, _) in parts.items()), members
    rows = sorted(str(r) for r in fastft.report(model).rows)
    assert any(part for _, part, _ in found.values())
    return found, rows


@pytest.mark.parametrize("name", MODELS)
def test_what_stands_there_is_what_stood_there(name, monkeypatch):
    torch.manual_seed(0)
    one = MODELS[name]()
    other = copy.deepcopy(one)
    assert find_twins(one.get_base_model() if hasattr(one, "get_base_model") else one).first
    ours = standing(fastft.patch(one))
    monkeypatch.setattr(observation, "find_twins", lambda model: Twins())
    every = standing(fastft.patch(other))
    assert ours == every
    fastft.unpatch(one)
    assert all(slot_of(m) is None for m in one.modules())


def test_one_proof_for_attributes_that_are_partial_functions(monkeypatch):
    """Gemma's activation keeps one."""
    monkeypatch.setattr(proof_cache, "CACHE", {})
    fastft.patch(gemma2())
    assert sum(kind == "mlp" for kind, *_ in proof_cache.CACHE) == 1


def test_calls_and_proofs():
    (few, few_proofs), (many, proofs) = (host_calls.of_patch(layers) for layers in (2, 32))
    assert proofs == few_proofs and many <= 1.2 * few, (few, many, proofs)


def changed_eps(layer):
    layer.input_layernorm.variance_epsilon *= 2


def another_activation(layer):
    layer.mlp.act_fn = nn.GELU()


def frozen(layer):
    layer.mlp.up_proj.lora_A["default"].weight.requires_grad_(False)


def another_dtype(layer):
    layer.mlp.down_proj.base_layer.to(torch.bfloat16)


def another_scaling(layer):
    layer.mlp.down_proj.scaling["default"] *= 2


def a_hook(layer):
    layer.mlp.register_forward_hook(lambda *given: None)


def evaluated(layer):
    layer.self_attn.eval()


def another_order(layer):
    layer._modules["mlp"] = layer._modules.pop("mlp")


def a_module_more(layer):
    layer.mlp.extra = nn.Identity()


def a_module_less(layer):
    layer.mlp.down_proj = layer.mlp.down_proj.base_layer


def a_shared_layer(layer):
    layer.self_attn.k_proj = layer.self_attn.v_proj


CHANGES = [
    changed_eps,
    another_activation,
    frozen,
    another_dtype,
    another_scaling,
    a_hook,
    evaluated,
    another_order,
    a_module_more,
    a_module_less,
    a_shared_layer,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_alike_is_no_twin(change):
    model = adapted(llama(layers=3)).get_base_model()
    layers = model.model.layers
    assert set(find_twins(model).first) == {layers[1], layers[2]}
    change(layers[1])
    assert set(find_twins(model).first) == {layers[2]}


def test_weights_of_another_format_are_no_twins():
    nf4, fp4 = (quantised(llama(layers=2), kind=kind) for kind in ("nf4", "fp4"))
    layers = nf4.model.layers
    assert set(find_twins(nf4).first) == {layers[1]}
    layers[1].mlp.up_proj = fp4.model.layers[1].mlp.up_proj
    assert not find_twins(nf4).first
    state = layers[1].mlp.up_proj.weight.quant_state = copy.deepcopy(layers[0].mlp.up_proj.weight.quant_state)
    layers[1].mlp.up_proj = copy.deepcopy(layers[0].mlp.up_proj)
    assert set(find_twins(nf4).first) == {layers[1]}
    layers[1].mlp.up_proj.weight.quant_state.code = state.code * 2
    assert not find_twins(nf4).first


class Halved(nn.Module):
    """Layers of which the second is given the first half of the row."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, input_ids):
        x = torch.zeros(*input_ids.shape, 8, device=input_ids.device)
        return self.layers[2](self.layers[1](self.layers[0](x)[:, :4]))


class Skipped(Halved):
    """Layers of which the second is not called, but one inside it."""

    def forward(self, input_ids):
        x = torch.zeros(*input_ids.shape, 8, device=input_ids.device)
        return self.layers[2](self.layers[1][0](self.layers[0](x)))


class Left(Halved):
    """Layers of which the last is not called."""

    def forward(self, input_ids):
        return self.layers[1](self.layers[0](torch.zeros(*input_ids.shape, 8, device=input_ids.device)))


@pytest.mark.parametrize("cls", [Halved, Skipped, Left])
def test_layers_that_are_called_otherwise_are_run(cls):
    model = cls()
    assert len(find_twins(model).first) == 2
    before = {n: (type(m), dict(m.__dict__), m._modules) for n, m in model.named_modules()}
    seen = observation.observe(model)
    assert not seen.twins.first and not seen.error
    called = {n for n, m in model.named_modules() if seen.of(m)}
    assert ("layers.1.0" in called) and ("layers.1" in called) is (cls is not Skipped)
    assert ("layers.2.0" in called) is (cls is not Left)
    for n, m in model.named_modules():
        assert (type(m), m.__dict__) == before[n][:2] and m._modules is before[n][2]


def test_a_second_patch_and_a_part_that_was_replaced():
    model = fastft.patch(adapted(llama(layers=3)))
    rows = sorted(str(r) for r in fastft.report(model).rows)
    layers = model.get_base_model().model.layers
    layers[2].mlp = fastft.unpatch(copy.deepcopy(layers[2].mlp))
    assert sorted(str(r) for r in fastft.report(fastft.patch(model)).rows) == rows
    train_step(model)


def test_hollow_layers_are_whole_again_after_an_error():
    model = llama(layers=3)
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(IndexError), hollow(find_twins(model)):
        list(model.modules())[len(names) - 1]
    assert [n for n, _ in model.named_modules()] == names
