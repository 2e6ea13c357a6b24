"""What autograd lets people do, patched against stock."""

import threading

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import fastft
from tests.linear.lora_models import (
    BASES,
    HIDDEN,
    both,
    dense,
    drawn,
    gradients,
    in_float64,
    judge,
    run,
    tokens,
    train_step,
)


def capture(model, forward):
    """The outputs of q, k and v in the first layer, as they leave their modules."""
    outs = {}
    attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
    names = ("q_proj", "k_proj", "v_proj")
    handles = [
        getattr(attention, n).register_forward_hook(lambda m, args, out, n=n: outs.update({n: out})) for n in names
    ]
    forward()
    for h in handles:
        h.remove()
    return outs


@pytest.mark.parametrize("base", BASES)
def test_the_first_input_needs_a_gradient_or_not(base):
    both(BASES[base])
    both(BASES[base], after=lambda m: m.enable_input_require_grads())


@pytest.mark.parametrize("base", BASES)
def test_gradients_of_embeddings_and_of_one_parameter(base):
    def step(model):
        e = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        loss = model(inputs_embeds=e, labels=tokens()).loss
        one = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj.lora_A.default").weight
        de, dA = torch.autograd.grad(loss, [e, one])
        assert all(p.grad is None for p in model.parameters())
        return {"d embeds": de, "d one": dA}

    both(BASES[base], step)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_backward_twice(dropout, base):
    def step(model):
        out = model(tokens(), labels=tokens())
        out.loss.backward(retain_graph=True)
        once = gradients(model)
        out.loss.backward()
        twice = gradients(model)
        for k, g in once.items():
            assert torch.equal(twice[k], g + g), k
        return {"loss": out.loss, **twice}

    both(lambda: BASES[base](dropout=dropout), step)


@pytest.mark.parametrize("base", BASES)
def test_accumulation(base):
    def step(model):
        losses = {}
        for i in range(3):
            losses[f"loss {i}"] = model(tokens(seed=i), labels=tokens(seed=i)).loss / 3
            losses[f"loss {i}"].backward()
        return losses | gradients(model)

    both(BASES[base], step)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_forwards_then_the_backwards_in_reverse(dropout, base):
    def step(model):
        losses = [model(tokens(1, n, seed=n), labels=tokens(1, n, seed=n)).loss for n in (5, 8)]
        for loss in reversed(losses):
            loss.backward()
        return {"a": losses[0], "b": losses[1], **gradients(model)}

    both(lambda: BASES[base](dropout=dropout), step)


@pytest.mark.parametrize("base", BASES)
def test_backward_in_another_thread_outside_autocast(base):
    def step(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype != torch.float64):
            out = model(tokens(), labels=tokens())
        thread = threading.Thread(target=out.loss.backward)
        thread.start()
        thread.join()
        return {"loss": out.loss.detach(), "logits": out.logits.detach(), **gradients(model)}

    both(lambda: BASES[base](dropout=0.2), step)


@pytest.mark.parametrize("base", BASES)
def test_incoming_gradients_expanded_transposed_and_missing(base):
    """The outputs of q, k and v taken apart: q's gradient is one expanded number, k's a transposed matrix, v's does not
    come."""

    def step(model):
        outs = capture(model, lambda: model(tokens(2)))
        w = torch.randn(HIDDEN // 2, 16, 2, generator=torch.Generator().manual_seed(1)).to(outs["k_proj"].dtype)
        loss = outs["q_proj"].sum() + (outs["k_proj"].permute(2, 1, 0) * w).sum()
        loss.backward()
        return {"loss": loss, **gradients(model)}

    model = both(BASES[base], step)
    assert {n.split(".")[6] for n in gradients(model)} == {"q_proj", "k_proj"}


@pytest.mark.parametrize("base", BASES)
def test_hooks_of_parameters_fire_once(base):
    """DDP and optimizer-in-backward live on them."""

    def step(model):
        fired, stepped = [], []
        for n, p in model.named_parameters():
            if p.requires_grad:
                p.register_hook(lambda g, n=n: fired.append(n) or g * 2)
                p.register_post_accumulate_grad_hook(lambda p, n=n: stepped.append(n))
        out = train_step(model)
        names = sorted(n for n, p in model.named_parameters() if p.requires_grad)
        assert sorted(fired) == names == sorted(stepped)
        return out

    both(BASES[base], step)


def graph_nodes(root):
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
    return seen


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("base", BASES)
def test_no_tensor_is_an_attribute_of_a_node(base):
    """Offloading and checkpointing would not see it."""
    model = fastft.patch(BASES[base](dropout=0.2))
    loss = model(tokens(), labels=tokens()).loss
    ours = [n for n in graph_nodes(loss.grad_fn) if type(n).__name__ == "_LoraLinearBackward"]
    assert len(ours) == 8
    for node in ours:
        kept = tensors_in(vars(node)) + [a for v in vars(node).values() if isinstance(v, tuple) for a in tensors_in(v)]
        assert not kept, [tuple(t.shape) for t in kept]


@pytest.mark.parametrize("base", BASES)
def test_saved_tensor_hooks_may_return_copies(base):
    def step(model):
        with saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
            out = model(tokens(), labels=tokens())
        out.loss.backward()
        return {"loss": out.loss, **gradients(model)}

    both(lambda: BASES[base](dropout=0.2), step)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_without_gradients(mode, base):
    def step(model):
        with mode():
            logits = model(tokens()).logits
            assert not logits.requires_grad and logits.grad_fn is None
            return {"logits": logits.clone()}

    both(BASES[base], step)


def test_inputs_are_not_modified():
    ours = fastft.patch(dense())
    e = ours.get_input_embeddings()(tokens()).detach().requires_grad_()
    before, kept = e.detach().clone(), []
    attention = ours.get_submodule("base_model.model.model.layers.0.self_attn")
    attention.q_proj.register_forward_pre_hook(
        lambda m, args: kept.append((args[0], args[0]._version, args[0].detach().clone()))
    )
    ours(inputs_embeds=e, labels=tokens()).loss.backward()
    x, version, values = kept[0]
    assert torch.equal(e, before) and e._version == 0 and x._version == version and torch.equal(x, values)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_and_nans_propagate(value, base):
    """They appear in the same elements of the outputs and of every gradient as in stock, and nowhere else."""

    def step(model):
        e = model.get_input_embeddings()(tokens()).detach().clone()
        e[0, 5, 3] = value
        e.requires_grad_()
        outs = capture(model, lambda: model(inputs_embeds=e))
        (outs["q_proj"][:, :4].sum() + outs["v_proj"].sum()).backward()
        return {**outs, "d embeds": e.grad, **gradients(model)}

    a, b = run(BASES[base](), step), run(fastft.patch(BASES[base]()), step)
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(torch.isfinite(a[k]), torch.isfinite(b[k])), k
    finite = torch.isfinite(b["q_proj"]).all(-1)[0]
    assert finite.tolist() == [True] * 5 + [False] + [True] * 10


@pytest.mark.parametrize("base", BASES)
def test_a_row_without_labels_and_a_single_token(base):
    def step(model):
        ids = tokens(2)
        labels = ids.clone()
        labels[1] = -100
        out = {"loss": model(ids, labels=labels).loss}
        out["loss"].backward()
        one = model(tokens(1, 1)).logits
        one.square().mean().backward()
        return out | {"one": one, **gradients(model)}

    both(BASES[base], step)


def test_a_member_called_outside_its_holder():
    """Someone calls one projection by itself, with a tensor that its siblings will not see."""

    def step(model):
        attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
        x = (
            torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(1))
            .to(next(model.parameters()).dtype)
            .requires_grad_()
        )
        y = attention.q_proj(x)
        with torch.no_grad():
            x.mul_(2.0) if not x.requires_grad else None
        z = attention.k_proj(x)
        (y.square().sum() + z.sum()).backward()
        return {"y": y, "z": z, "d x": x.grad, **gradients(model)}

    both(dense, step)


def test_an_input_changed_in_place_between_siblings():
    """up_proj's pre-hook writes into the input that gate_proj was given: the results left for it are void."""

    def spoil(model):
        mlp = model.get_submodule("base_model.model.model.layers.0.mlp")

        def write(module, args, out):
            args[0].mul_(0.5)

        mlp.gate_proj.register_forward_hook(write)

    def step(model):
        with torch.no_grad():
            return {"logits": model(tokens()).logits}

    both(lambda: drawn(dense()), step, after=spoil)


def test_a_loss_of_logits_and_hidden_states():
    def step(model):
        out = model(tokens(), output_hidden_states=True)
        loss = out.logits.float().square().mean() + sum(h.float().abs().mean() for h in out.hidden_states)
        loss.backward()
        return {"loss": loss, "h": out.hidden_states[1], **gradients(model)}

    both(dense, step)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base", BASES)
def test_second_derivatives(base, dropout):
    """A Hessian times a vector and a gradient penalty: stock's values, through norms, groups, MLP, rotary and the
    head's loss."""

    def step(model):
        e = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        loss = model(inputs_embeds=e, labels=tokens()).loss
        wanted = [e, *(p for p in model.parameters() if p.requires_grad)]
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        sum(d.square().sum() for d in first).backward()
        return {"loss": loss, "first": first[0], "e": e.grad, **gradients(model)}

    both(lambda: drawn(BASES[base](config={"attn_implementation": "eager"}, dropout=dropout)), step)


def test_two_models_train_interleaved():
    """Students and teachers of one class: nothing is shared but proofs."""

    def step(pair):
        a, b = pair
        out_a, out_b = a(tokens(), labels=tokens()), b(tokens(seed=1), labels=tokens(seed=1))
        found = {"a": out_a.loss, "b": out_b.loss, "logits of a": out_a.logits, "logits of b": out_b.logits}
        out_b.loss.backward()
        out_a.loss.backward()
        return {**found, **gradients(a), **{f"{k} of b": g for k, g in gradients(b).items()}}

    make = lambda: (dense(), dense(seed=5))
    fast = tuple(map(fastft.patch, make()))
    judge(run(fast, step), run(tuple(map(in_float64, make())), step, reference=True), run(make(), step))


def test_train_and_eval_alternate():
    def step(model):
        out = {f"1 {k}": v for k, v in train_step(model).items()}
        model.eval()
        with torch.no_grad():
            out["eval"] = model(tokens()).logits
        model.train()
        return {k.replace("1 d", "d 1"): v for k, v in out.items()} | train_step(model)

    for base in BASES.values():
        both(lambda base=base: base(dropout=0.2), step)
