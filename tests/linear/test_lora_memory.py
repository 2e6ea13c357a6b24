"""Nothing that a group leaves for its siblings outlives the holder's call."""

import gc
import io
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastft
from tests.linear.lora_models import BASES, HIDDEN, LAYERS, dense, groups_of, nf4, tokens, train_step

EXPECTED = 4 * LAYERS  # q k v, o, gate up, down in each layer


class Watch:
    """Weak references to every tensor that ever stood in a group, and to every input a group was given."""

    def __init__(self, model):
        self.groups, self.refs, self.left = groups_of(model), [], 0
        assert len(self.groups) == EXPECTED
        for group in self.groups:
            group.compute = self.noting(group, group.compute)

    def noting(self, group, compute):
        def run(module, x):
            y = compute(module, x)
            left = [t for t, _ in group.now.call.left.values()] if group.now.call else []
            self.refs += [weakref.ref(t) for t in (x, *left)]
            self.left += len(left)
            return y

        return run

    def assert_gone(self, alive=()):
        for g in self.groups:
            assert g.now.call is None
        gc.collect()
        kept = [r() for r in self.refs if r() is not None and not any(r() is t for t in alive)]
        assert not kept, [tuple(t.shape) for t in kept]


@pytest.mark.parametrize("base", BASES)
def test_after_a_step(base):
    model = fastft.patch(BASES[base]())
    watch = Watch(model)
    train_step(model)
    assert watch.left == 3 * LAYERS and len(watch.refs) == (4 + 3) * LAYERS
    watch.assert_gone()


def test_between_forward_and_backward_only_the_graph_holds():
    model = fastft.patch(dense())
    watch = Watch(model)
    loss = model(tokens(), labels=tokens()).loss
    assert all(g.now.call is None for g in watch.groups)
    loss.backward()
    del loss
    watch.assert_gone()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_early_stopped_recomputation(reentrant, base):
    model = fastft.patch(BASES[base](dropout=0.2))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    watch = Watch(model)
    train_step(model)
    assert watch.left >= 2 * 3 * LAYERS - 3  # the recomputation ran the groups again, but for where it stopped
    watch.assert_gone()


def test_a_recomputation_that_stops_between_siblings():
    """The holder itself is checkpointed, and stops as soon as what the backward needs is there."""
    model = fastft.patch(dense())
    watch = Watch(model)
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    x = torch.randn(2, 4, HIDDEN, requires_grad=True)
    checkpoint(mlp, x, use_reentrant=False).sum().backward()
    del x
    watch.assert_gone()


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.up_proj", "self_attn.v_proj"])
def test_exception_in_the_middle_of_a_forward(name):
    model = fastft.patch(dense())
    watch = Watch(model)

    class Halt(Exception):
        pass

    def halt(module, args):
        raise Halt

    handle = model.get_submodule(f"base_model.model.model.layers.0.{name}").register_forward_hook(
        lambda m, a, o: halt(m, a)
    )
    with pytest.raises(Halt):
        model(tokens())
    handle.remove()
    watch.assert_gone()
    train_step(model)
    watch.assert_gone()


def test_interrupt_in_a_backward():
    model = fastft.patch(dense())
    watch = Watch(model)
    model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default").weight.register_hook(
        lambda g: (_ for _ in ()).throw(KeyboardInterrupt())
    )
    loss = model(tokens(), labels=tokens()).loss
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    del loss
    watch.assert_gone()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_generation_loop(training, mode):
    model = fastft.patch(nf4(dropout=0.1)).train(training)
    watch = Watch(model)
    with mode():
        model.generate(input_ids=tokens(2), max_new_tokens=4, do_sample=False, use_cache=True)
    assert watch.left == 0  # without gradients every member is stock's own
    watch.assert_gone()


def test_a_member_called_by_itself_leaves_nothing():
    model = fastft.patch(dense())
    watch = Watch(model)
    x = torch.randn(2, 4, HIDDEN)
    y = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")(x)
    assert y.shape == (2, 4, HIDDEN) and watch.left == 0
    watch.assert_gone(alive=(x,))


def test_a_sibling_that_is_never_called():
    """Its result is computed and thrown away with the holder's call."""
    model = fastft.patch(dense())
    watch = Watch(model)
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    mlp.gate_proj.register_forward_hook(lambda m, a, o: setattr(mlp, "seen", o.detach().sum().item()))

    class Stop(Exception):
        pass

    mlp.gate_proj.register_forward_hook(lambda m, a, o: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        mlp(torch.randn(2, 4, HIDDEN))
    watch.assert_gone()


def test_a_patched_model_is_freed_with_its_last_name_as_stock_is():
    """No reference cycle: `del model; torch.cuda.empty_cache()` gives the memory back, without a garbage collection."""
    for patch in (lambda m: m, fastft.patch):
        model = patch(dense())
        train_step(model)
        refs = [weakref.ref(m) for m in model.get_base_model().modules()]
        while gc.collect():  # what the patch itself left
            pass
        gc.disable()
        try:
            del model
            assert not [r() for r in refs if r() is not None]
        finally:
            gc.enable()


def test_a_pickled_model_is_stock():
    model = fastft.patch(dense())
    want = model(tokens()).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"fastft." not in buffer.getvalue()
    buffer.seek(0)
    back = torch.load(buffer, weights_only=False)
    stock = fastft.unpatch(model)
    assert all(type(a) is type(b) for a, b in zip(back.modules(), stock.modules(), strict=True))
    assert torch.equal(back(tokens()).logits, stock(tokens()).logits) and torch.allclose(
        back(tokens()).logits, want, atol=1e-5
    )
    assert fastft.report(fastft.patch(back)).swapped
