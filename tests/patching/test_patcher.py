"""A whole model is patched or stock: out of memory in the middle; parameters on several devices."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import fastft
from fastft.errors import FastftError
from fastft.linear import groups as linears
from fastft.linear.group_forward import HolderCall
from fastft.patching.kind import Candidate
from fastft.proving import proof_cache as proofs
from fastft.proving import prove as prove_module
from fastft.proving.prove import prove
from fastft.swapping.swap import is_fast
from tests.linear.lora_models import (
    adapted,
    dense,
    fallbacks,
    groups_of,
    in_float64,
    judge,
    llama,
    run,
    tokens,
    train_step,
)
from tests.mlp import test_mlp
from tests.norm import test_norms

NO_ROOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
NO_ROOM_ON_THE_HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:125] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 "
    "bytes"
)


def state(model):
    return {n: (type(m), sorted(m.__dict__), m.training) for n, m in model.named_modules()}


PLACES = {"proof": (prove_module, "compare"), "swap": (linears, "install")}


def fails_at(monkeypatch, where, error, nth=3):
    """The nth comparison in the proofs of a process that has none yet, or the nth swap of a linear layer, and all later
    ones, find no memory."""
    monkeypatch.setattr(proofs, "CACHE", {})
    original, calls = getattr(*PLACES[where]), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) >= nth:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(*PLACES[where], counted)


@pytest.mark.parametrize("error", [NO_ROOM, NO_ROOM_ON_THE_HOST], ids=["device", "host"])
@pytest.mark.parametrize("where", ["proof", "swap"])
def test_out_of_memory_leaves_a_stock_model(monkeypatch, where, error):
    model = dense()
    before = state(model)
    with monkeypatch.context() as m:
        fails_at(m, where, error)
        with pytest.raises(
            FastftError, match=r"no memory was left .* the model is stock again: free some and patch again"
        ) as e:
            fastft.patch(model)
        assert isinstance(e.value, torch.OutOfMemoryError) and e.value.__cause__ is error
    assert state(model) == before
    assert all(r.is_swapped for r in fastft.report(fastft.patch(model))), "no failure was remembered"


def test_out_of_memory_in_a_candidate_is_no_failed_proof():
    class Full(torch.nn.Linear):
        def forward(self, x):
            raise NO_ROOM

    stock = torch.nn.Linear(4, 4)
    with pytest.raises(torch.OutOfMemoryError):
        prove(
            stock,
            lambda m: setattr(m, "__class__", Full),
            lambda g, s: [torch.randn(2, 4, generator=g)],
            dtype=torch.float32,
        )


@pytest.mark.parametrize(
    ("recognise", "module", "given"),
    [
        (test_norms.recognise, test_norms.RMS(), ("",)),
        (test_norms.recognise, test_norms.Gated(), ("", "gate")),
        (test_mlp.recognise, test_mlp.Plain(), ()),
    ],
    ids=["norm", "gated-norm", "mlp"],
)
def test_out_of_memory_while_recognising_is_no_reason(recognise, module, given):
    """A module that runs into it when it is probed is not taken for one that cannot be run."""
    probed = copy.deepcopy(module)

    class Full(type(module)):
        def forward(self, *args, **kwargs):
            raise NO_ROOM

    assert isinstance(recognise(probed, *given), Candidate)
    probed.__class__ = Full
    with pytest.raises(torch.OutOfMemoryError):
        recognise(probed, *given)


def test_patching_again_without_memory_keeps_what_was_patched(monkeypatch):
    model = fastft.patch(llama())
    model = adapted(model)
    with monkeypatch.context() as m:
        fails_at(m, "proof", NO_ROOM, nth=1)
        with pytest.raises(FastftError, match="what was patched before stays patched"):
            fastft.patch(model)
    assert any(is_fast(m, "norm") for m in model.modules())
    stock = adapted(llama())
    judge(run(model, train_step), run(in_float64(stock), train_step, reference=True), run(stock, train_step))


def test_no_memory_in_the_middle_of_a_run_goes_on_as_stock(monkeypatch):
    """Adapters put on after the patch are proven in the first step: without room they stay stock, and join later."""
    model, stock = adapted(fastft.patch(llama())), adapted(llama())
    with monkeypatch.context() as m:
        fails_at(m, "proof", NO_ROOM, nth=1)
        ours = run(model, train_step)
    judge(ours, run(in_float64(stock), train_step, reference=True), run(stock, train_step))
    left = [r for r in fastft.report(model).stock if r.kind == "linear group"]
    assert left and all("no memory was left for its proof" in r.reason for r in left), left
    assert all(r.is_swapped for r in fastft.report(fastft.patch(model)))


ON_DISK = {
    **dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"),
    "model.layers.1": "disk",
}


def test_layers_on_the_disk(tmp_path):
    """A device map with an offloaded layer: what is swapped there runs on the weights that Accelerate fetches."""
    llama().save_pretrained(tmp_path / "model")

    make = lambda: AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=ON_DISK, offload_folder=tmp_path / "offload"
    ).train()
    stock, ours = make(), fastft.patch(make())
    assert any(p.device.type == "meta" for p in ours.parameters())
    eager = run(stock, train_step)
    reference = {
        k: v for k, v in run(in_float64(llama()), train_step, reference=True).items() if k in eager
    }  # what is fetched takes no gradient
    judge(run(ours, train_step), reference, eager)
    assert (
        fastft.report(ours)
        .notes[0]
        .startswith("on several devices (cpu, offloaded): every module runs where it stands")
    )
    assert not fastft.report(ours).stock and not fallbacks(ours)
    for m in (stock, ours):
        m.zero_grad(set_to_none=True)
    fastft.unpatch(ours)
    assert all(torch.equal(a, b) for a, b in zip(run(ours, train_step).values(), run(stock, train_step).values()))


def test_adapters_on_the_disk_cannot_learn_and_the_report_says_so(tmp_path):
    """Stock's error in the backward says nothing of that; it stays the error."""
    llama().save_pretrained(tmp_path / "model")
    said = []
    for patch in (lambda m: m, fastft.patch):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=ON_DISK, offload_folder=tmp_path / "offload"
        )
        model = patch(adapted(loaded))
        with pytest.raises(RuntimeError, match="expected device meta but got cpu") as e:
            train_step(model)
        said.append(type(e.value))
    assert said[0] is said[1]
    assert any(
        n.startswith("14 of the parameters that are to learn are offloaded") and "4 bits" in n
        for n in fastft.report(model).notes
    )


def test_every_layer_fetched_for_its_call():
    stock, ours = (
        cpu_offload(llama(), execution_device=torch.device("cpu")),
        fastft.patch(cpu_offload(llama(), execution_device=torch.device("cpu"))),
    )
    assert any(n.startswith("on several devices (offloaded)") for n in fastft.report(ours).notes)
    logits = lambda m: {"logits": m.train()(tokens()).logits.detach()}
    judge(run(ours, logits), run(in_float64(llama()), logits, reference=True), run(stock, logits))


def test_members_on_several_devices_compute_for_themselves():
    """Fake tensors stand for the second device: what is there is not multiplied with an input that is here."""
    model = fastft.patch(dense())
    attention = model.get_base_model().model.layers[0].self_attn
    group = next(g for g in groups_of(model) if attention.q_proj in g.members)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for p in attention.k_proj.parameters():
            p.data = torch.empty(p.shape, device="cuda")
        group.now.call = HolderCall()
        attention.q_proj(torch.empty(1, 4, 64, requires_grad=True))
        assert list(group.now.call.left) == [attention.v_proj]
        group.now.call = None


def test_a_model_that_does_not_say_where_its_embedding_is():
    """transformers' method raises then, as it does for some models that read images."""

    class Mute(LlamaForCausalLM):
        def get_input_embeddings(self):
            raise NotImplementedError("please override in the subclass")

    model, stock = llama(), llama()
    model.__class__ = Mute
    judge(
        run(fastft.patch(model), train_step), run(in_float64(stock), train_step, reference=True), run(stock, train_step)
    )


def test_a_model_on_one_device_says_nothing_of_it():
    assert fastft.patching.patcher.devices_note(copy.deepcopy(dense())) == []


def test_another_default_device():
    """Proofs draw on the CPU where somebody has torch make its tensors elsewhere."""
    model = llama()
    proofs.CACHE.clear()
    torch.set_default_device("meta")
    try:
        fastft.patch(model)
    finally:
        torch.set_default_device(None)
    assert {r.kind for r in fastft.report(model).swapped} >= {"norm", "rotary", "mlp", "head"}
