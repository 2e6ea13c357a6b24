"""Activation checkpointing as transformers and TRL use it, patched against stock."""

import contextlib
import functools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastft
from tests.linear.lora_models import BASES, VOCAB, both, dense, gradients, run, same_bits, tokens, train_step


def checkpointing(reentrant):
    return lambda model: (
        model.gradient_checkpointing_enable({"use_reentrant": reentrant}) or model.enable_input_require_grads()
    )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_and_not(reentrant, dropout, base):
    both(lambda: BASES[base](dropout=dropout), after=checkpointing(reentrant))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_autocast(reentrant, base):
    def step(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype != torch.float64):
            out = model(tokens(), labels=tokens())
            logits = out.logits
        out.loss.backward()
        return {"loss": out.loss.detach(), "logits": logits.detach(), **gradients(model)}

    both(lambda: BASES[base](dropout=0.1), step, after=checkpointing(reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_every_second_layer(reentrant):
    def alternate(model):
        checkpointing(reentrant)(model)
        for i, layer in enumerate(model.get_submodule("base_model.model.model.layers")):
            layer.gradient_checkpointing = i % 2 == 0

    both(lambda: dense(dropout=0.2), after=alternate)


@pytest.mark.parametrize("base", BASES)
def test_the_same_bits_with_and_without(base):
    """Recomputation runs the same products in the same order, and dropout draws the same masks."""
    plain = run(fastft.patch(BASES[base](dropout=0.2)), train_step)
    for reentrant in (True, False):
        model = fastft.patch(BASES[base](dropout=0.2))
        checkpointing(reentrant)(model)
        same_bits(plain, run(model, train_step))


def saved_bytes(model):
    """Bytes that autograd keeps after the forward, once per storage, parameters apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            kept[s.data_ptr()] = (s.nbytes(), t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = model(tokens(2, 16), labels=tokens(2, 16)).loss
    total = sum(n for n, _ in kept.values())
    loss.backward()
    return total


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_are_really_dropped(reentrant):
    make = lambda: dense(config=dict(vocab_size=4 * VOCAB))  # stock keeps logits: more of them than hidden states
    stock, ours = make(), fastft.patch(make())
    without = saved_bytes(ours)
    for m in (stock, ours):
        m.zero_grad(set_to_none=True)
        checkpointing(reentrant)(m)
    a, b = saved_bytes(ours), saved_bytes(stock)
    assert a <= b and a < without / 2, (a, b, without)


@pytest.mark.parametrize("base", BASES)
def test_checkpoint_function_overwritten_every_step(base):
    """TRL's trainers switch it off around generation, on again, and put their own function in place."""

    def step(model):
        out = {}
        for i in range(2):
            model.gradient_checkpointing_disable()
            with torch.no_grad():
                out[f"between {i}"] = model(tokens(seed=i)).logits
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for m in model.modules():
                if hasattr(m, "_gradient_checkpointing_func"):
                    m._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
            loss = model(tokens(seed=i), labels=tokens(seed=i)).loss
            loss.backward()
            out[f"loss {i}"] = loss
        return out | gradients(model)

    both(lambda: BASES[base](dropout=0.1), step)


@pytest.mark.parametrize("base", BASES)
def test_generation_in_train_mode_with_checkpointing_on(base):
    def generate(model):
        checkpointing(False)(model)
        torch.manual_seed(0)
        with torch.no_grad(), contextlib.redirect_stderr(None):
            return model.generate(input_ids=tokens(2), max_new_tokens=4, do_sample=False, use_cache=False)

    stock, ours = BASES[base](), fastft.patch(BASES[base]())
    assert torch.equal(generate(stock), generate(ours))
    both(BASES[base], lambda m: generate(m) is None or train_step(m))


class Offload(saved_tensors_hooks):
    """What activation offloading does: every activation leaves and comes back as another tensor, once."""

    def __init__(self, model):
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.away, self.back = {}, set()

        def pack(t):
            if t.untyped_storage().data_ptr() in own:
                return t
            self.away[len(self.away)] = t.detach().to("cpu", copy=True)
            return len(self.away) - 1

        def unpack(i):
            if isinstance(i, torch.Tensor):
                return i
            assert i not in self.back, "a tensor was fetched twice"
            self.back.add(i)
            return self.away[i].clone()

        super().__init__(pack, unpack)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_activation_offloading(reentrant, base):
    """TRL's needs an accelerator; its contract does not."""

    def step(model):
        with Offload(model):
            loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        return {"loss": loss, **gradients(model)}

    both(lambda: BASES[base](dropout=0.2), step, after=None if reentrant is None else checkpointing(reentrant))
