"""What a group's first member leaves is taken by those alone who would have computed the same: by thread, mode,
adapters and call."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

import fastft
from fastft.linear.group_forward import KIND
from fastft.swapping.swap import is_fast
from tests.linear.lora_models import (
    HIDDEN,
    adapted,
    both,
    dense,
    fallbacks,
    groups_of,
    in_float64,
    judge,
    llama,
    run,
    same_bits,
    tokens,
    train_step,
)

MISSED = "another grad mode, autocast or saved-tensor hook"


class GateWithoutGrad(LlamaMLP):
    def forward(self, x):
        with torch.no_grad():
            gate = self.gate_proj(x)
        return self.down_proj(F.silu(gate) * self.up_proj(x))


class GateWithGrad(LlamaMLP):
    def forward(self, x):
        with torch.no_grad():
            up = self.up_proj(x)
        with torch.enable_grad():
            gate = self.gate_proj(x)
        return self.down_proj(F.silu(gate) * up)


class Alternating(LlamaMLP):
    """A member's results are computed under autocast off, between others that are under it."""

    def forward(self, x):
        up = self.up_proj(x)
        with torch.autocast("cpu", enabled=False):
            gate = self.gate_proj(x.float())
        self.seen = gate.dtype
        return self.down_proj(F.silu(gate).to(up.dtype) * up)


class OtherAdapters(LlamaMLP):
    def forward(self, x):
        gate = self.gate_proj(x)
        self.up_proj.enable_adapters(False)
        up = self.up_proj(x)
        self.up_proj.enable_adapters(True)
        return self.down_proj(F.silu(gate) * up)


def with_mlp(cls, **lora):
    def make():
        model = llama()
        for m in model.modules():
            if type(m) is LlamaMLP:
                m.__class__ = cls
        return adapted(model, **lora)

    return make


@pytest.mark.parametrize("cls", [GateWithoutGrad, GateWithGrad, OtherAdapters])
def test_each_member_in_the_mode_of_its_own_call(cls):
    model = both(with_mlp(cls), fast=None)
    went = fallbacks(model)
    if cls is OtherAdapters:
        assert any("adapters were switched" in k for k in went), went
    else:  # a member without gradients is stock's own, and leaves nothing that could be taken
        assert not went
    assert all(is_fast(m.gate_proj, KIND) for m in model.modules() if isinstance(m, cls))


def test_autocast_off_around_one_member():
    seen = []
    for patched in (False, True):
        model = with_mlp(Alternating)()
        if patched:
            fastft.patch(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(tokens())
        seen.append({m.seen for m in model.modules() if isinstance(m, Alternating)})
    assert seen[0] == seen[1] == {torch.float32}


def test_hooks_on_saved_tensors_between_members():
    """The hooks pack what that member saves, and nothing of its siblings'."""

    class Packed(LlamaMLP):
        def forward(self, x):
            up = self.up_proj(x)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                gate = self.gate_proj(x)
            return self.down_proj(torch.sin(gate) * up)  # no formula of an MLP's: its own code runs

    packed: list[int] = []

    def note(t):
        packed.append(t.numel())
        return t

    model = both(with_mlp(Packed), fast=None)
    assert any(MISSED in k for k in fallbacks(model)) and packed


def test_members_that_never_share_stop_computing_for_each_other():
    """After a few results that nobody could take, a step costs what it should."""
    model = fastft.patch(with_mlp(GateWithoutGrad)())
    for _ in range(6):
        train_step(model)
    before = sum(fallbacks(model).values())
    train_step(model)
    assert sum(fallbacks(model).values()) == before


def test_ordinary_calls_share():
    model = fastft.patch(dense())
    train_step(model)
    assert (
        not fallbacks(model)
        and all(g.wasted == 0 for g in groups_of(model))
        and {len(g.members) for g in groups_of(model)} == {1, 2, 3}
    )


def test_concurrent_forwards():
    model = fastft.patch(dense()).eval()
    batches = [tokens(seed=s) for s in range(8)]

    def logits(i):
        with torch.no_grad():
            return i, model(batches[i]).logits

    alone = [logits(i)[1] for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for i, y in pool.map(logits, [i % 8 for i in range(400)]):
            assert torch.equal(y, alone[i])


def test_a_member_called_inside_a_siblings_hook():
    """With the same input, and with another."""

    class Hooked(LlamaMLP):
        def forward(self, x):
            more = lambda _, args, y: y + self.up_proj(args[0]) + 0.1 * self.up_proj(args[0] * 2)
            handle = self.gate_proj.register_forward_hook(more)
            try:
                return super().forward(x)
            finally:
                handle.remove()

    both(with_mlp(Hooked), fast=None)


def test_a_holder_called_inside_itself():
    """What the inner call leaves and clears is not the outer one's."""

    class Twice(LlamaMLP):
        def forward(self, x, depth=1):
            gate = self.gate_proj(x)
            if depth:
                gate = gate + self.gate_proj(self(x * 0.5, 0))
            return self.down_proj(F.silu(gate) * self.up_proj(x))

    both(with_mlp(Twice), fast=None)


@pytest.mark.parametrize("change", ["merge_and_unload", "unload", "replace"])
def test_copies_of_models_whose_members_have_gone(change):
    def changed(model):
        if change != "replace":
            return getattr(model, change)().train()
        for m in model.modules():
            if isinstance(m, LlamaMLP):
                m.up_proj = copy.deepcopy(m.up_proj.get_base_layer())
        return model

    stock, ours = changed(dense()), changed(fastft.patch(dense()))
    for copied in (copy.deepcopy(ours), copy.deepcopy(copy.deepcopy(ours)), pickle.loads(pickle.dumps(ours))):
        for p in (*stock.parameters(), *copied.parameters()):
            p.requires_grad_()
        stock.zero_grad()
        judge(run(copied, train_step), run(in_float64(stock), train_step, reference=True), run(stock, train_step))


def test_a_copy_has_groups_of_its_own():
    model = fastft.patch(dense())
    copied = copy.deepcopy(model)
    run(copied, train_step)
    assert not fallbacks(copied) and [len(g.members) for g in groups_of(copied)] == [
        len(g.members) for g in groups_of(model)
    ]
    assert not {id(m) for g in groups_of(copied) for m in g.members} & {
        id(m) for g in groups_of(model) for m in g.members
    }
    fastft.unpatch(copied)
    assert all(is_fast(m, KIND) for g in groups_of(model) for m in g.members)
    same_bits(run(model, train_step), run(fastft.patch(dense()), train_step))


def test_a_copy_of_a_holder_alone():
    model = fastft.patch(dense())
    mlp = model.get_base_model().model.layers[0].mlp
    alone, x = copy.deepcopy(mlp), torch.randn(1, 4, HIDDEN)
    assert torch.equal(alone(x), mlp(x)) and is_fast(alone.up_proj, KIND)


def replica_of(model: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes it."""
    modules = list(model.modules())
    at, replicas = {id(m): i for i, m in enumerate(modules)}, [m._replicate_for_data_parallel() for m in modules]
    for module, replica in zip(modules, replicas):
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[at[id(child)]]
        for name, p in module._parameters.items():
            if p is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, p.view_as(p))
    return replicas[0]


def test_a_data_parallel_replica():
    """It gives stock's values and gradients, runs the swaps, and leaves the original's groups where they are."""
    stock, ours = dense(), fastft.patch(dense())

    def step(model):
        out = replica_of(model)(input_ids=tokens(), labels=tokens())
        out.loss.backward()
        return {
            "loss": out.loss.detach(),
            "logits": out.logits.detach(),
            **{f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None},
        }

    judge(run(ours, step), run(in_float64(stock), step, reference=True), run(stock, step))
    assert not {k: n for k, n in fastft.report(ours).fallbacks.items() if not k.startswith("head")}
    assert all(is_fast(m, KIND) for g in groups_of(ours) for m in g.members) and {
        len(g.members) for g in groups_of(ours)
    } == {1, 2, 3}
    ours.zero_grad()
    same_bits(run(ours, train_step), run(fastft.patch(dense()), train_step))
