"""Out of memory in the first step: the step is run again under a lower policy, with the same bits, and later steps keep
it."""

import warnings
import weakref

import pytest
import torch

import fastft
from fastft.checkpointing.controller import controller_of
from fastft.lm_head import product as head_product
from tests.checkpointing.test_activation import N, checkpointed, last, layers_of, model_of, notes
from tests.linear.lora_models import BASES, gradients, in_float64, judge, run, same_bits, train_step


class Full:
    """Raises OutOfMemoryError at the nth event of a kind until the policy is `enough`."""

    def __init__(self, model, where, enough, at=3):
        self.controller, self.enough, self.at, self.calls, self.raised = (
            controller_of(model.get_base_model()),
            enough,
            at,
            0,
            0,
        )
        for layer in layers_of(model):
            if where == "forward":
                layer.mlp.register_forward_pre_hook(lambda *_: self.count())
            else:
                layer.mlp.register_forward_hook(lambda m, args, out: out.register_hook(lambda g: self.count()) and None)

    def count(self):
        self.calls += 1
        if self.controller.mode != self.enough and self.calls >= self.at:
            self.calls, self.raised = 0, self.raised + 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("enough", ["lean", "offload"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_step_is_run_again_with_less(where, enough, base):
    def step(model):
        return train_step(model) | {"random": torch.rand(3)}

    plain = run(fastft.patch(model_of(base)), step)
    model = checkpointed(fastft.patch(model_of(base), activation_policy="auto"))
    full = Full(model, where, enough)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = run(model, step)
    lowered = [
        str(w.message)
        for w in said
        if "out of memory in the first step (CUDA out of memory. Tried to allocate 2.00 GiB.)" in str(w.message)
    ]
    assert [m.split("lowered to ")[1].split(",")[0] for m in lowered] == {
        "lean": ["'lean'"],
        "offload": ["'lean'", "'offload'"],
    }[enough]
    assert full.raised == {"lean": 1, "offload": 2}[enough]
    same_bits(plain, got)
    assert "forward" not in model.get_base_model().model.__dict__ or controller_of(model.get_base_model()).passed
    model.zero_grad(set_to_none=True)
    full.enough = full.controller.mode
    same_bits(plain, run(model, step))
    assert last(model).startswith(f"{N} {'recomputed' if enough == 'lean' else 'offloaded'}")
    assert f"lowered to {enough} when memory ran out" in notes(model)[0]
    assert "forward" not in model.get_base_model().model.__dict__


def test_without_checkpointing_too_and_under_autocast():
    def step(model):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=torch.arange(3, 11)[None], labels=torch.arange(3, 11)[None])
        out.loss.backward()  # outside autocast, as trainers do
        return {"loss": out.loss, **{f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}}

    plain = run(fastft.patch(model_of()), step)
    model = fastft.patch(model_of(), activation_policy="auto")
    Full(model, "backward", "lean")
    with pytest.warns(UserWarning, match="lowered"):
        same_bits(plain, run(model, step))


@pytest.mark.parametrize("enough", ["lean", "never"])
def test_the_head_asks_for_the_memory_of_the_layers(enough, monkeypatch):
    plain = run(fastft.patch(model_of()), train_step)
    model = checkpointed(fastft.patch(model_of(), activation_policy="auto"))
    controller, whole, states = controller_of(model.get_base_model()), head_product.linear_cross_entropy, []
    look = (
        model.get_base_model()
        .model.layers[N - 1]
        .register_forward_hook(lambda m, args, out: states.append(weakref.ref(args[0])))
    )

    def head(*args, **kwargs):
        if controller.mode != enough:
            # the layers' activations are there
            assert (len(states) == 1 and states[0]() is not None) or controller.lowered
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert states[0]() is None  # and gone
        return whole(*args, **kwargs)

    monkeypatch.setattr(head_product, "linear_cross_entropy", head)
    if enough == "never":
        with pytest.warns(UserWarning, match="lowered"), pytest.raises(torch.OutOfMemoryError):
            run(model, train_step)
        return
    with pytest.warns(UserWarning, match="lowered to 'lean'"):
        same_bits(plain, run(model, train_step))
    look.remove()
    monkeypatch.undo()
    model.zero_grad(set_to_none=True)
    same_bits(plain, run(model, train_step))
    assert last(model).startswith(f"{N} recomputed")


def test_what_is_there_of_a_gradient_stays():
    """The second micro-batch of an accumulation runs out of memory."""

    def step(model):
        return train_step(model) | {f"2 {k}": v for k, v in train_step(model).items()}

    plain = run(fastft.patch(model_of()), step)
    model = checkpointed(fastft.patch(model_of(), activation_policy="auto"))
    Full(model, "backward", "lean", at=2)
    with pytest.warns(UserWarning, match="lowered"):
        same_bits(plain, run(model, step))


@pytest.mark.parametrize("policy", ["none", "lean", "trainer", "offload"])
def test_an_explicit_policy_is_not_changed(policy):
    model = checkpointed(fastft.patch(model_of(), activation_policy=policy))
    Full(model, "forward", "never")
    with pytest.raises(torch.OutOfMemoryError):
        run(model, train_step)


def test_when_nothing_lower_is_left_the_error_is_the_users():
    model = checkpointed(fastft.patch(model_of(), activation_policy="auto"))
    full = Full(model, "forward", "never")
    with pytest.warns(UserWarning, match="lowered"), pytest.raises(torch.OutOfMemoryError):
        run(model, train_step)
    assert full.raised == 3 and model.get_base_model().model.layers[0].gradient_checkpointing
    assert not [p for p in model.parameters() if p.grad is not None]


def test_the_guard_is_exact_and_goes():
    model = checkpointed(fastft.patch(model_of(), activation_policy="auto"))
    backbone = model.get_base_model().model
    assert "forward" in backbone.__dict__
    plain = run(fastft.patch(model_of()), train_step)
    same_bits(plain, run(model, train_step))
    model.zero_grad(set_to_none=True)
    same_bits(plain, run(model, train_step))
    assert "forward" not in backbone.__dict__
    other = fastft.patch(model_of(), activation_policy="auto")
    fastft.unpatch(other)
    assert "forward" not in other.get_base_model().model.__dict__


def test_a_graph_used_twice_and_two_forwards():
    def step(model):
        ids = torch.arange(3, 11)[None]
        a, b = model(ids, labels=ids).loss, model(ids + 1, labels=ids).loss
        b.backward(retain_graph=True)
        a.backward()
        b.backward()
        return {"a": a, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    same_bits(
        run(fastft.patch(model_of()), step), run(checkpointed(fastft.patch(model_of(), activation_policy="auto")), step)
    )


def inputs_and_one_parameter(model):
    embeds = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    loss = model(inputs_embeds=embeds, labels=torch.arange(3, 11)[None]).loss
    dx, dp = torch.autograd.grad(loss, (embeds, next(p for p in model.parameters() if p.requires_grad)))
    return {"dx": dx, "dp": dp, "loss": loss}


def hooked_parameters(model):
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda g: 2 * g)
    return train_step(model)


def loss_from_within(model):
    seen = []
    layers_of(model)[1].mlp.register_forward_hook(lambda m, args, out: seen.append(out))
    ids = torch.arange(3, 11)[None]
    loss = model(ids, labels=ids).loss + seen[0].square().sum()
    loss.backward()
    return {"loss": loss.detach(), "inside": seen[0].detach(), **gradients(model)}


@pytest.mark.parametrize("step", [inputs_and_one_parameter, hooked_parameters])
def test_who_asks_for_more_than_a_step_is_not_guarded(step):
    same_bits(run(fastft.patch(model_of()), step), run(fastft.patch(model_of(), activation_policy="auto"), step))


def test_a_second_loss_from_within_goes_through_the_same_graph():
    """In the first step the two losses' gradients are summed at the parameters and not on the way: other roundings, no
    other gradient."""
    stock = model_of()
    reference = run(in_float64(stock), loss_from_within, reference=True)
    ours = fastft.patch(model_of(), activation_policy="auto")
    judge(run(ours, loss_from_within), reference, run(stock, loss_from_within))
