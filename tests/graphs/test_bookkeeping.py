"""Who waits, what is eager and why, and what is left as it was."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.checkpointing.layer_stack import GRAPHS
from fastft.errors import GraphsError
from fastft.graphs.recorder import CudaRecorder, RerunRecorder, cuda_obstacle
from fastft.graphs.stack import MOST
from fastft.swapping.swap import is_fast, slot_of
from tests.graphs.graph_models import (
    LAYERS,
    differing,
    eager,
    graphs_of,
    layers_of,
    loss_of,
    patched,
    replays,
    train,
    with_graphs,
)
from tests.linear.lora_models import dense, gradients, tokens


def warm(model, n=8, rows=2):
    """The calls of the next forward have come often enough."""
    for i in range(2):
        loss_of(model, i, rows, n).backward()
    model.zero_grad(set_to_none=True)
    return model


def both(step, **how):
    """step(model) on a model without graphs and on one whose next forward is replayed: the same bits. Returns the
    second."""
    plain, model = warm(patched(False, **how)), warm(patched(True, **how))
    a, b = step(plain), step(model)
    assert not differing(a, b), differing(a, b)
    return model


def losses(**found):
    return {k: v.detach() for k, v in found.items()}


def test_a_second_forward_before_the_backward_is_eager():
    def step(model):
        a, b = loss_of(model, 3), loss_of(model, 4)
        b.backward()
        a.backward()
        return losses(a=a, b=b) | gradients(model)

    model = both(step)
    assert replays(model) == LAYERS
    assert eager(model) == {"another forward waits for its backward": LAYERS}


def test_a_sum_of_two_losses():
    def step(model):
        loss = loss_of(model, 3) - 2 * loss_of(model, 4)
        loss.backward()
        return losses(loss=loss) | gradients(model)

    both(step)


def test_another_signature_between_a_forward_and_its_backward():
    def step(model):
        for i in range(3):
            loss_of(model, i, n=6).backward()  # B is captured after A
        model.zero_grad()
        a = loss_of(model, 3)
        b = loss_of(model, 4, n=6)
        a.backward()
        b.backward()
        return losses(a=a, b=b) | gradients(model)

    both(step)


def test_a_forward_that_is_dropped_frees_its_graph():
    model = warm(patched())
    loss = loss_of(model, 3)
    assert replays(model) == LAYERS
    del loss
    loss_of(model, 4).backward()
    assert replays(model) == 2 * LAYERS and not eager(model)


def test_a_loss_that_is_kept_after_its_backward_holds_nothing():
    model = warm(patched())
    loss = loss_of(model, 3)
    loss.backward()
    loss_of(model, 4).backward()
    assert replays(model) == 2 * LAYERS and loss is not None


def test_a_graph_that_is_retained_and_used_twice():
    def step(model):
        a = loss_of(model, 3)
        a.backward(retain_graph=True)
        once = gradients(model)
        b = loss_of(model, 4)  # a still waits
        a.backward()
        b.backward()
        return losses(a=a, b=b) | gradients(model) | {f"once {k}": v for k, v in once.items()}

    assert eager(both(step))["another forward waits for its backward"] == LAYERS


def test_a_graph_that_was_freed_is_stocks_error():
    model = warm(patched())
    loss = loss_of(model, 3)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_derivatives():
    def step(model):
        loss = loss_of(model, 3)
        params = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, params, create_graph=True)
        norm = sum(g.square().sum() for g in found)
        norm.backward()
        return losses(norm=norm) | gradients(model)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain, model = warm(patched(False)), warm(patched())
        a, b = step(plain), step(model)
    assert torch.equal(a["norm"], b["norm"])  # of first derivatives; second ones are summed in another order
    far = {k: float((a[k] - b[k]).abs().max() / a[k].abs().max()) for k in a}
    assert max(far.values()) < 64 * torch.finfo(torch.float32).eps, far
    assert eager(model) == {"a backward that is itself to be differentiated": LAYERS}


def test_gradients_of_inputs_and_of_one_parameter():
    def step(model):
        embeds = model.get_input_embeddings()(tokens(2, 8)).detach().requires_grad_()
        found = {}
        for i in range(4):
            loss = model(inputs_embeds=embeds, labels=tokens(2, 8)).loss
            last = [p for p in layers_of(model)[1].parameters() if p.requires_grad][-1]
            found |= {f"{i} {j}": g for j, g in enumerate(torch.autograd.grad(loss, [embeds, last]))}
        return found

    assert replays(both(step)) == 2 * LAYERS + 2  # the first layer's input has a gradient now: another call


def test_hooks_of_parameters_fire_and_gradients_are_the_parameters_own():
    def step(model):
        seen = {}
        for n, p in model.named_parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p, n=n: seen.__setitem__(f"post {n}", p.grad.clone()))
                p.register_hook(lambda g, n=n: seen.__setitem__(f"hook {n}", g.clone()))
        loss_of(model, 3).backward()
        loss_of(model, 4).backward()
        return seen | gradients(model)

    assert replays(both(step)) == 2 * LAYERS


def test_a_parameter_changed_before_the_backward_is_an_error():
    model = warm(patched())
    loss = loss_of(model, 3)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1.0)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_the_adapter_switched_between_forward_and_backward():
    """(The gradients are those of the adapter that the forward saw.)"""

    def step(model):
        loss = loss_of(model, 3)
        with model.disable_adapter():
            reference = loss_of(model, 3)
            loss.backward()
        return losses(loss=loss, reference=reference) | gradients(model)

    both(step)


EAGER = {
    "saved tensors": lambda m: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "anomaly": lambda m: torch.autograd.detect_anomaly(check_nan=False),
    "mode listens": lambda m: torch.utils.flop_counter.FlopCounterMode(display=False),
}


@pytest.mark.parametrize("reason", EAGER)
@pytest.mark.filterwarnings("ignore:Anomaly")
def test_contexts_in_which_calls_are_eager(reason):
    def step(model):
        with EAGER[reason](model):
            loss = loss_of(model, 3)
        loss.backward()
        return losses(loss=loss) | gradients(model)

    model = both(step)
    ((why, n),) = eager(model).items()
    assert reason in why and n == LAYERS and not replays(model)


def test_hooks_on_modules_inside_a_layer():
    seen = []

    def before(model, i):
        if i == 5:
            layers_of(model)[1].mlp.register_forward_hook(lambda *a: seen.append(1))
            layers_of(model)[2].register_forward_hook(lambda m, a, out: out * 2)

    plain, model = train(patched(False), before=before, steps=9), patched()
    assert not differing(plain, train(model, before=before, steps=9))
    assert len(seen) == 8  # (in both)
    assert eager(model) == {"hooks stand on modules inside a layer": 4}


def test_hidden_states_and_attentions():
    def step(model):
        out = model(tokens(2, 8), labels=tokens(2, 8), output_hidden_states=True)
        (out.loss + sum(h.float().square().mean() for h in out.hidden_states)).backward()
        return losses(loss=out.loss, **{str(i): h for i, h in enumerate(out.hidden_states)}) | gradients(model)

    model = both(step)
    assert eager(model) == {"hidden states, attentions or router logits are asked for": LAYERS}
    for i in range(3):
        loss_of(model, i).backward()
    assert replays(model) == LAYERS  # the hooks that transformers has left there do nothing


def test_dropout_is_eager_and_draws_what_it_drew():
    def run(model):
        torch.manual_seed(5)
        return train(model, steps=5) | {"state": torch.get_rng_state()}

    model = patched(dropout=0.2)
    assert not differing(run(patched(False, dropout=0.2)), run(model))
    assert not replays(model) and "random numbers" in next(iter(eager(model)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_the_users_own(reentrant):
    def enable(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        if not reentrant:
            for layer in layers_of(model):
                layer._gradient_checkpointing_func = lambda f, *a: checkpoint(f, *a, use_reentrant=False)
        return model

    model = enable(patched())
    assert not differing(train(enable(patched(False)), steps=5), train(model, steps=5))
    assert not replays(model)


def test_plain_checkpointing_is_recomputed_inside_the_backward_graph():
    def enable(model):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        return model

    model = enable(patched())
    assert not differing(train(enable(patched(False)), steps=6), train(model, steps=6))
    assert replays(model) == 4 * LAYERS


@pytest.mark.parametrize("policy", ["offload", "auto"])
def test_other_policies(policy):
    model = patched(policy=policy)
    assert not differing(train(patched(False, policy=policy), steps=6), train(model, steps=6))
    assert bool(replays(model)) == (policy == "auto")


def test_a_layer_that_changes_itself_in_a_call():
    class Counting(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0
            self.register_buffer("sum", torch.zeros(()))

        def forward(self, x):
            if self.attribute:
                self.calls += 1
            else:
                self.sum += x.detach().mean()
            return self.inner(x)

    for Counting.attribute in (True, False):
        models = []
        for graphs in (False, True):
            model = dense(config={"layers": LAYERS})
            layer = layers_of(model)[1]
            layer.input_layernorm = Counting(layer.input_layernorm)
            fastft.patch(model)
            models.append(with_graphs(model) if graphs else model)
        assert not differing(*(train(m, steps=6) for m in models))
        a, b = (layers_of(m)[1].input_layernorm for m in models)
        assert a.calls == b.calls and torch.equal(a.sum, b.sum)
        assert Counting.attribute or eager(models[1]) == {"a layer changes its buffers or parameters in a call": 4}
        assert replays(models[1]) == 4 * (LAYERS - 1)


def test_what_captures_leave_as_it_was():
    model = warm(patched())
    loss_of(model, 1).backward()
    before, random = gradients(model), torch.get_rng_state()
    fallbacks = fastft.report(model).fallbacks
    model2 = warm(patched())
    loss_of(model2, 9)  # captured, no backward
    assert not gradients(model2)
    assert torch.equal(random, torch.get_rng_state()) and not differing(before, gradients(model))
    assert fastft.report(model2).fallbacks == fallbacks


def test_an_error_while_capturing_leaves_the_eager_path():
    class Failing(RerunRecorder):
        def capture(self, run):
            run()
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    plain, model = patched(False), with_graphs(patched(False), Failing())
    assert not differing(train(plain, steps=5), train(model, steps=5))
    assert list(eager(model)) == ["capturing failed: RuntimeError: operation not permitted"]
    assert any("capturing failed" in note for note in fastft.report(model).notes)


def test_at_most_a_handful_and_the_oldest_goes():
    def step(model, i):
        loss = loss_of(model, i, n=4 + i // 3)
        loss.backward()
        return {"loss": loss}

    model = patched()
    assert not differing(train(patched(False), step, 21), train(model, step, 21))
    assert replays(model) == 7 * LAYERS
    kept = [s for s in graphs_of(model).seen if s.captured is not None]
    assert len(kept) == MOST and graphs_of(model).stack.captures.total() == MOST * LAYERS


def test_threads():
    """Two at once: one of them may be eager, and both are right."""
    model = warm(patched())
    expected = [loss_of(warm(patched(False)), i).detach() for i in range(8)]
    found, errors = {}, []

    def work(i):
        try:
            found[i] = loss_of(model, i).detach()
        except Exception as e:
            errors.append(e)

    ids = [torch.as_tensor(i) for i in range(8)]
    threads = [threading.Thread(target=work, args=(int(i),)) for i in ids]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and all(torch.equal(found[i], expected[i]) for i in range(8))


def test_the_exact_undo():
    stock = dense(config={"layers": LAYERS})
    before = [(type(m), dict(m.__dict__)) for m in stock.modules()]
    model = with_graphs(fastft.patch(stock))
    train(model, steps=4)
    loss = loss_of(model, 3)
    fastft.unpatch(model)
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == [(c, set(d)) for c, d in before]
    loss.backward()  # of a forward that was replayed


def test_copies_have_graphs_of_their_own():
    model = patched()
    train(model, steps=4)
    twin = copy.deepcopy(model)
    assert graphs_of(twin).stack is graphs_of(twin, 1).stack is not graphs_of(model).stack
    assert not replays(twin)
    a = train(model, steps=4)
    assert not differing(a, train(twin, steps=4)) and replays(twin) == 2 * LAYERS
    read = pickle.loads(pickle.dumps(model.get_base_model()))
    assert all(slot_of(m) is None for m in read.modules())


def test_a_model_is_freed_with_its_last_name():
    for policy in (None, "lean"):
        model = patched(policy=policy)
        train(model, steps=4)
        assert replays(model)
        gc.collect()
        gc.disable()
        try:
            layer, parameter = weakref.ref(layers_of(model)[0]), weakref.ref(next(model.parameters()))
            stack = weakref.ref(graphs_of(model).stack)
            del model
            alive = [r() is not None for r in (layer, parameter, stack)]
        finally:
            gc.enable()
        gc.collect()
        assert layer() is None and parameter() is None and stack() is None, alive


def test_settings():
    model = fastft.patch(dense(config={"layers": LAYERS}))
    assert not any(is_fast(m, GRAPHS) for m in model.modules())  # "auto" on a CPU
    assert not any("CUDA graphs" in n for n in fastft.report(model).notes)
    fastft.patch(model, cuda_graphs=True)
    train(model, steps=4)
    assert not replays(model)
    assert any("asked for: the model is on a cpu device" in n for n in fastft.report(model).notes)
    fastft.patch(model)
    assert is_fast(layers_of(model)[0], GRAPHS)
    fastft.patch(model, cuda_graphs=False)
    assert not any(is_fast(m, GRAPHS) for m in model.modules())
    for wrong in ("yes", 1.0, 2):
        with pytest.raises(GraphsError, match="want 'auto', True or False"):
            fastft.patch(model, cuda_graphs=wrong)


def test_fast_model_takes_the_setting(tmp_path):
    dense(config={"layers": 2}).get_base_model().save_pretrained(tmp_path)
    with contextlib.redirect_stdout(None):
        assert is_fast(layers_of(fastft.FastModel.from_pretrained(tmp_path, cuda_graphs=True))[0], GRAPHS)
        with pytest.raises(GraphsError):
            fastft.FastModel.from_pretrained(tmp_path, cuda_graphs="always")


def test_the_report():
    model = patched()
    train(model, steps=5)
    lines = [n for n in fastft.report(model).notes if n.startswith("CUDA graphs")]
    assert lines[0] == f"CUDA graphs: LlamaModel, {LAYERS} layers: {LAYERS} captured, 9 of 15 calls replayed"
    assert "6 calls ran eagerly" in lines[1] and len(lines) == 2


def test_devices():
    assert "no CUDA graphs" in cuda_obstacle(torch.device("cpu"))
    assert CudaRecorder().obstacle(torch.device("cpu"))


def test_calls_that_never_repeat_are_soon_not_looked_at(monkeypatch):
    monkeypatch.setattr("fastft.graphs.layer.PATIENCE", 4)
    model = patched()
    for i in range(9):
        loss_of(model, i, n=4 + i).backward()
    assert sum(n for why, n in eager(model).items() if why.startswith("calls that differ")) == 4 * LAYERS
    for i in range(20):
        loss_of(model, i, n=20).backward()
    assert replays(model) > 0
