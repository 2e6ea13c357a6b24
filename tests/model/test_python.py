"""What Python sees of a patched model is what it sees of a stock one: signatures, hooks, recorded outputs, state, what
is saved and uploaded."""

import inspect
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from peft import PeftModel

import fastft
from fastft.patching.patcher import record_of
from fastft.swapping.swap import is_fast, slot_of
from tests.linear.lora_models import (
    BASES,
    adapted,
    both,
    dense,
    gradients,
    in_float64,
    judge,
    llama,
    nf4,
    run,
    tokens,
    train_step,
)


def without_patch(model):
    return {k: n for k, n in fastft.report(model).fallbacks.items() if not k.startswith("head")}


@pytest.mark.parametrize("base", BASES)
def test_signatures_classes_and_state(base):
    """Every module's forward takes what stock's takes; names, classes by isinstance, and the state's layout (4-bit too)
    are stock's."""
    stock, ours = BASES[base](), fastft.patch(BASES[base]())
    for (n, a), (m, b) in zip(stock.named_modules(), ours.named_modules(), strict=True):
        assert n == m and isinstance(b, type(a)) and inspect.signature(a.forward) == inspect.signature(b.forward)
        assert type(b).__module__ == type(a).__module__ and str(type(b).__doc__) == str(type(a).__doc__)
    for when in ("patched", "trained"):
        a, b = stock.state_dict(), ours.state_dict()
        assert list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a), when
        run(ours, train_step)
    if base == "dense":  # bitsandbytes' layers load no quantisation state by this door
        assert str(stock.load_state_dict(b)) == str(ours.load_state_dict(a)) == "<All keys matched successfully>"


def test_outside_and_inside_it_is_the_same_class():
    """The model itself keeps its class: what is recorded and saved goes by it."""
    model = fastft.patch(dense())
    base = model.get_base_model()
    assert (
        type(model).__name__ == "PeftModelForCausalLM"
        and type(base).__name__ == "LlamaForCausalLM"
        and type(base.model).__name__ == "LlamaModel"
    )


def test_patching_twice_changes_nothing():
    model = fastft.patch(dense())
    run(model, train_step)
    before = {n: (type(m), id(slot_of(m)), sorted(m.__dict__)) for n, m in model.named_modules()}
    record, said = record_of(model), str(fastft.report(model))
    assert fastft.patch(model) is model and record_of(model) is record and str(fastft.report(model)) == said
    assert {n: (type(m), id(slot_of(m)), sorted(m.__dict__)) for n, m in model.named_modules()} == before


INNER = [
    "model.layers.0",
    "model.layers.0.self_attn",
    "model.layers.1.mlp",
    "model.layers.0.input_layernorm",
    "model.norm",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.act_fn",
    "model.layers.0.self_attn.o_proj",
    "lm_head",
    "model.embed_tokens",
]


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_inner_modules_fire_and_change_outputs(when):
    """On every kind of module, put on before the patch or after it."""

    def scaled(module, args, out):
        return (out[0] * 1.25, *out[1:]) if isinstance(out, tuple) else out * 1.25

    def hooked(model):
        fired.clear()
        for name in INNER:
            module = model.get_base_model().get_submodule(name)
            module.register_forward_hook(lambda m, a, o, name=name: fired.append(name))
            module.register_forward_hook(scaled)
        return model

    fired = []
    model = both(
        lambda: hooked(dense()) if when == "before" else dense(), after=hooked if when == "after" else None, fast=None
    )
    fired.clear()
    run(model, train_step)
    assert sorted(fired) == sorted(INNER)


@pytest.mark.parametrize("base", BASES)
def test_hidden_states_and_attentions_are_returned(base):
    """And the hooks that recorded them, which transformers leaves behind, do not switch the fast path off."""
    config = dict(attn_implementation="eager")

    def recorded(model):
        out = model(input_ids=tokens(), labels=tokens(), output_hidden_states=True, output_attentions=True)
        out.loss.backward()
        names = {f"hidden {i}": h.detach() for i, h in enumerate(out.hidden_states)} | {
            f"attention {i}": a.detach() for i, a in enumerate(out.attentions)
        }
        return {"loss": out.loss.detach(), **names, **gradients(model)}

    ours = both(lambda: BASES[base](config=config), recorded)
    assert len(run(ours, recorded).keys() & {"hidden 0", "hidden 2", "attention 1"}) == 3 and not without_patch(ours)
    ours.zero_grad(set_to_none=True)
    stock = BASES[base](config=config)
    judge(run(ours, train_step), run(in_float64(stock), train_step, reference=True), run(stock, train_step))
    assert not without_patch(ours) and any(is_fast(m, "linear group") for m in ours.modules())


def test_an_optimizer_in_the_backward():
    """A step per parameter from its post-accumulate hook, as torchtune and others do it; the gradient is gone
    afterwards."""

    def step(model):
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters() if p.requires_grad}

        def update(p):
            optimizers[p].step()
            optimizers[p].zero_grad()

        handles = [p.register_post_accumulate_grad_hook(update) for p in optimizers]
        losses = []
        for _ in range(3):
            out = model(input_ids=tokens(), labels=tokens())
            out.loss.backward()
            losses.append(out.loss.detach())
        for handle in handles:
            handle.remove()
        assert all(p.grad is None for p in model.parameters())
        return {"losses": torch.stack(losses)} | {
            f"d {n}": p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
        }

    both(dense, step)
    both(nf4, step)


def uploaded(monkeypatch, model):
    """What `push_to_hub` would send: the repository's name and every file's bytes. huggingface_hub's two calls that go
    out are caught."""
    sent = {}

    def repository(api, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def commit(api, repo_id, operations, **kwargs):
        for o in operations:
            sent[repo_id, o.path_in_repo] = (
                o.path_or_fileobj if isinstance(o.path_or_fileobj, bytes) else Path(o.path_or_fileobj).read_bytes()
            )

    monkeypatch.setattr(HfApi, "create_repo", repository)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    model.push_to_hub("tuned", commit_message="a test")
    return sent


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # older PEFT, of a base without a name
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_push_to_hub_sends_stocks_bytes(monkeypatch, full):
    make = llama if full else dense
    stock, ours = make(), fastft.patch(make())
    assert inspect.signature(ours.push_to_hub) == inspect.signature(stock.push_to_hub)
    expected, found = (uploaded(monkeypatch, m) for m in (stock, ours))
    name = "model.safetensors" if full else "adapter_model.safetensors"
    assert ("me/tuned", name) in expected and expected == found


def test_saved_in_full_as_stock_saves_it(tmp_path):
    llama().save_pretrained(tmp_path / "stock")
    fastft.patch(llama()).save_pretrained(tmp_path / "ours")
    files = sorted(p.name for p in (tmp_path / "stock").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "ours").iterdir())
    assert all((tmp_path / "stock" / n).read_bytes() == (tmp_path / "ours" / n).read_bytes() for n in files)


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # older PEFT, of a base without a name
def test_an_adapter_loads_into_a_patched_base(tmp_path):
    """`PeftModel.from_pretrained` on a base that was patched before."""
    dense().save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(fastft.patch(llama()), tmp_path, is_trainable=True).train()
    stock = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    judge(run(ours, train_step), run(in_float64(stock), train_step, reference=True), run(stock, train_step))
    assert all(r.is_swapped for r in fastft.report(ours) if r.kind == "linear group")


def test_merge_and_unload_is_stocks(tmp_path):
    """The merged model has stock's bits, and loads without PEFT."""
    stock, ours = adapted(llama()).merge_and_unload(), adapted(fastft.patch(llama())).merge_and_unload()
    a, b = stock.state_dict(), ours.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    fastft.unpatch(ours).save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again.eval()(tokens()).logits, stock.eval()(tokens()).logits)
