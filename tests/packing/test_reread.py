"""Logits that are looked at after a forward that ran without its padding are stock's, padded positions included, with
their gradients."""

import copy
import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers.modeling_outputs import SequenceClassifierOutput

import fastft
from fastft.packing.entrance import RereadError
from fastft.packing.hooks import packing_of
from fastft.proving.prove import agree
from tests.linear.lora_models import gradients, in_float64, judge, run
from tests.packing import packing_models as pm


def batch(left=False):
    return pm.padded_batch(pm.documents(), left)


def unpadded(model):
    return next(
        h.packing for m in model.modules() for h in m._forward_pre_hooks.values() if hasattr(h, "packing")
    ).counts["unpadded"]


def both(model, out, extra):
    loss = out.loss + extra
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


READS = {
    "pow": lambda o: o.logits.float().pow(2).mean(),
    "key": lambda o: o["logits"].log_softmax(-1).mean(),
    "index": lambda o: o[1].tanh().sum() * 1e-2,
    "tuple": lambda o: o.to_tuple()[1].sigmoid().mean(),
    "last": lambda o: o.logits[:, -1].pow(2).mean(),
    "clone": lambda o: o.logits.clone().float().clone().pow(2).mean(),
    "function": lambda o: Half.apply(o.logits).pow(2).mean(),
    "twice": lambda o: o.logits.pow(2).mean() + o.logits.abs().mean(),
}


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, g):
        return g * 0.5


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("read", list(READS))
def test_a_loss_of_the_logits_is_stock_s(read, lora, left):
    b = batch(left)
    step = lambda m: (lambda o: both(m, o, READS[read](o)))(m(**b))
    exact, ours = pm.build("full", lora).double(), fastft.patch(pm.build("full", lora)).double()
    # in float64: of two graphs, whose rounding is not stock's
    assert not agree(run(ours, step, reference=True), run(exact, step, reference=True))
    assert unpadded(ours) == 1
    run(ours, step)
    assert unpadded(ours) == 1 and any(
        n.startswith("padded batches run padded: logits were read") for n in fastft.report(ours).notes
    )


@pytest.mark.parametrize("way", ["hook", "retain", "grad", "late", "no grad", "eval"])
def test_what_autograd_and_time_ask(way):
    b = batch()

    def step(m):
        o = m(**b)
        if way == "hook":
            o.logits.register_hook(lambda g: g * 0.5)
            o.loss.backward()
            return gradients(m)
        if way == "retain":
            o.logits.retain_grad()
            (o.loss + o.logits.pow(2).mean()).backward()
            return {"g": o.logits.grad.clone(), **gradients(m)}
        if way == "grad":
            return {"g": torch.autograd.grad(o.loss, o.logits)[0]}
        if way == "late":
            o.loss.backward()
            return {"z": o.logits.detach() + 0}
        if way == "no grad":
            with torch.no_grad():
                return {"z": o.logits + 0}
        m.eval()
        z = o.logits.detach() + 0
        m.train()
        return {"z": z}

    stock, ours = pm.build("full"), fastft.patch(pm.build("full"))
    judge(run(ours, step), run(in_float64(stock), step, reference=True), run(stock, step))
    assert unpadded(ours) == 1


class LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.logsumexp(-1)

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return z.softmax(-1) * g.unsqueeze(-1)


def with_a_bias(model, learns=True):
    old = model.lm_head
    model.lm_head = torch.nn.Linear(old.in_features, old.out_features)
    model.lm_head.weight.data.copy_(old.weight.data)
    model.lm_head.bias.data.copy_(torch.randn(pm.VOCAB, generator=torch.Generator().manual_seed(7)) * 0.2)
    model.lm_head.bias.requires_grad_(learns)
    return model


MODELS = {
    "no bias": lambda: pm.build("full"),
    "bias": lambda: with_a_bias(pm.build("full")),
    "frozen bias": lambda: with_a_bias(pm.build("full"), learns=False),
}


def beside_stock(kind, step):
    """In float64: of two graphs, whose rounding is not stock's."""
    stock, ours = MODELS[kind]().double(), fastft.patch(MODELS[kind]()).double()
    assert not agree(run(ours, step, reference=True), run(stock, step, reference=True))
    assert unpadded(ours) == 1


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("wanted", ["all", "some", "logits", "inputs"])
@pytest.mark.parametrize("function", [Half, LogSumExp])
def test_a_partial_backward_through_a_function_gives_and_writes_what_stock_does(function, wanted, kind):
    b = batch()

    def step(m):
        z = m(**b).logits
        loss = function.apply(z).pow(2).mean()
        norm = m.model.norm.weight
        if wanted == "inputs":
            loss.backward(inputs=[norm])
            assert [p is norm for p in m.parameters() if p.grad is not None] == [True]
            return gradients(m)
        of = {"all": list(m.parameters()), "some": [norm], "logits": [z]}[wanted]
        of = [t for t in of if t.requires_grad]
        found = torch.autograd.grad(loss, of)
        assert all(p.grad is None for p in m.parameters())
        return {f"g{i}": g for i, g in enumerate(found)}

    beside_stock(kind, step)


def test_a_partial_backward_through_a_function_runs_the_hooks_of_parameters_once():
    b = batch()

    def step(m):
        norm, calls = m.model.norm.weight, []
        handle = norm.register_hook(lambda g: (calls.append(1), g * 0.5)[1])
        (g,) = torch.autograd.grad(Half.apply(m(**b).logits).pow(2).mean(), [norm])
        assert len(calls) == 1 and list(norm._backward_hooks) == [handle.id]
        handle.remove()
        return {"g": g}

    beside_stock("no bias", step)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", ["hook", "retain", "grad"])
def test_the_gradient_of_read_logits_has_its_padding_also_where_the_bias_learns(way, kind):
    b = batch()

    def step(m):
        o, seen = m(**b), []
        loss = o.loss + o.logits.pow(2).mean()
        if way == "grad":
            return {"g": torch.autograd.grad(loss, o.logits)[0]}
        if way == "hook":
            o.logits.register_hook(lambda g: seen.append(g.clone()))
        else:
            o.logits.retain_grad()
        loss.backward()
        return {"g": seen[0] if seen else o.logits.grad.clone(), **gradients(m)}

    beside_stock(kind, step)


def test_after_a_step_the_read_says_what_to_do():
    m, b = fastft.patch(pm.build("full")), batch()
    out = m(**b)
    out.loss.backward()
    torch.optim.SGD(m.parameters(), 0.1).step()
    assert out.logits.shape == (*b["input_ids"].shape, pm.VOCAB) and out.logits.dtype == torch.float32
    with pytest.raises(RereadError, match="unpad=False"):
        out.logits.argmax(-1)
    for _ in range(2):
        m(**b).loss.backward()
    assert unpadded(m) == 3  # an output that is kept, and not read, costs nothing


@pytest.mark.parametrize("kept", [False, True])
def test_a_trained_head_makes_no_logits_for_an_output_that_is_not_read(kept):
    m, b = fastft.patch(pm.build("full")), batch()
    out = m(**b)
    loss = out.loss
    if not kept:
        del out
    loss.backward()
    assert unpadded(m) == 1 and not fastft.report(m).fallbacks


def test_shifted_labels_and_a_hook_on_the_head():
    b = batch()
    b["shift_labels"] = torch.nn.functional.pad(b["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    stock, ours = pm.build("full"), fastft.patch(pm.build("full"))
    judge(run(ours, pm.step(b)), run(in_float64(stock), pm.step(b), reference=True), run(stock, pm.step(b)))
    assert unpadded(ours) == 1
    means = []
    for m in (stock, ours):
        m.lm_head.register_forward_hook(lambda module, args, out: means.append(args[0].mean().detach()))
        m(**b)
    assert abs(means[0] - means[1]) < 1e-5 * abs(means[0]) and unpadded(ours) == 1


def test_another_adapter_state_is_an_error_and_evaluation_is_not():
    m, b = fastft.patch(pm.build("full", lora=True)), batch()
    with m.disable_adapter():
        out = m(**b)
    with pytest.raises(RereadError):
        out.logits.sum()


def test_pickle_and_copies_read():
    m, b = fastft.patch(pm.build("full")), batch()
    stock = pm.build("full")
    with torch.no_grad():
        ours, want = m(**b), stock(**b)
        assert unpadded(m) == 1
        for got in (copy.deepcopy(ours).logits, pickle.loads(pickle.dumps(ours)).logits):
            assert (got - want.logits).abs().max() < 1e-5 * want.logits.abs().max()


@pytest.mark.parametrize("labels", [False, True], ids=["scores", "loss"])
@pytest.mark.parametrize("way", ["plain", "padding inside", "left padding only", "empty row", "other ids"])
def test_classifiers_pool_a_real_token(way, labels):
    def build():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**pm.SIZES, num_labels=3)).train()

    b = batch(left=way == "left padding only")
    del b["labels"]
    if labels:
        b["labels"] = torch.arange(5) % 3
    if way == "padding inside":
        b["input_ids"][0, 2] = 0
    if way == "left padding only":
        b["input_ids"][2] = 0  # its one real token is the padding's
    if way == "empty row":
        b["attention_mask"][2], b["input_ids"][2] = 0, 0
    if way == "other ids":
        b["input_ids"][b["attention_mask"] == 0] = 7
    step = lambda m: (lambda o: (o.logits.pow(2).sum().backward(), {"z": o.logits.detach(), **gradients(m)})[1])(m(**b))
    stock, ours = build(), fastft.patch(build())
    judge(run(ours, step), run(in_float64(stock), step, reference=True), run(stock, step))
    assert unpadded(ours) == (way in ("plain", "padding inside"))


class MeanPooled(LlamaForSequenceClassification):
    """A head over all positions."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        out = self.model(input_ids, attention_mask=attention_mask)
        return SequenceClassifierOutput(logits=self.score(out.last_hidden_state).mean(1))


def test_what_pools_the_padding_stays_padded():
    b = batch()
    del b["labels"]
    torch.manual_seed(0)
    stock = MeanPooled(LlamaConfig(**pm.SIZES, num_labels=3)).train()
    ours = fastft.patch(copy.deepcopy(stock))
    want, got = stock(**b).logits, ours(**b).logits
    assert (got - want).abs().max() < 1e-5 and not unpadded(ours)
    assert any("depends on its padding" in k for k in fastft.report(ours).fallbacks), fastft.report(ours).fallbacks


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "default"])
@pytest.mark.parametrize("length", [12, 20, 40])
def test_tables_that_depend_on_the_length(kind, length):
    rope = {
        "default": {"rope_type": "default"},
        "dynamic": {"rope_type": "dynamic", "factor": 2.0},
        "longrope": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 16,
        },
    }[kind]

    def build():
        torch.manual_seed(0)
        sizes = {**pm.SIZES, "max_position_embeddings": 16, "rope_parameters": {"rope_theta": 1e4, **rope}}
        return LlamaForCausalLM(LlamaConfig(**sizes)).train()

    b = pm.padded_batch(pm.documents((5, 9, 10)))
    b = {
        k: torch.nn.functional.pad(v, (0, length - v.shape[1]), value=-100 if k == "labels" else 0)
        for k, v in b.items()
    }
    stock, ours = build(), fastft.patch(build())
    judge(run(ours, pm.step(b)), run(in_float64(stock), pm.step(b), reference=True), run(stock, pm.step(b)))
    assert unpadded(ours) == (kind == "default" or length <= 16)


def test_a_backbone_and_a_model_inside_another():
    b = batch()
    labels = b.pop("labels")
    torch.manual_seed(0)
    ours = fastft.patch(LlamaModel(LlamaConfig(**pm.SIZES)).train())
    ours(**b).last_hidden_state.sum().backward()
    assert not unpadded(fastft.patch(ours)) if packing_of(ours).counts else True

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.student = pm.build("full")

        def forward(self):
            out = self.student(**b, labels=labels)
            return out.loss + out.logits.pow(2).mean()

    stock, fast = Outer(), Outer()
    fastft.patch(fast.student)
    step = lambda m: (lambda loss: (loss.backward(), {"loss": loss.detach(), **gradients(m)})[1])(m())
    judge(run(fast, step), run(in_float64(stock), step, reference=True), run(stock, step))
    assert unpadded(fast.student) == 1
