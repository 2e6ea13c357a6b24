"""Packed rows: trained as their documents would be one by one, without a mask of the row, for every kind of
attention."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastft
from fastft.packing.attention import AttentionSettings, by_document
from fastft.packing.documents import DocumentMask, Documents, MaskReadError
from tests.linear.lora_models import in_float64, judge, run, same_bits
from tests.packing import packing_models as pm

T = 36


class NoSquare(TorchDispatchMode):
    """No boolean tensor of tokens x tokens is made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.dtype == torch.bool
            and out.shape[-2:] == (T, T)
            and out.untyped_storage().nbytes() > T
        ):
            raise AssertionError(f"{func} made a mask {tuple(out.shape)}")
        return out


def packed_notes(model):
    return [n for n in fastft.report(model).notes if "packed" in n]


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("family", list(pm.FAMILIES))
def test_packed_training_is_training_of_each_document(family, lora):
    docs = pm.documents()
    stock, ours = pm.build(family, lora), fastft.patch(pm.build(family, lora))
    if lora:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours.enable_input_require_grads()
    # the proof, made at the first packed row, is not what is looked at
    run(ours, pm.step(pm.packed_batch(pm.documents(seed=1))))
    ours.zero_grad(set_to_none=True)
    with NoSquare():
        found = run(ours, pm.step(pm.packed_batch(docs)))
    judge(found, run(in_float64(stock), pm.alone(docs), reference=True), run(stock, pm.alone(docs)))
    assert packed_notes(ours) == ["2 packed rows (10 documents, 72 tokens) ran without a mask"], packed_notes(ours)
    assert not fastft.report(ours).fallbacks


@pytest.mark.parametrize(
    "form",
    [
        AttentionSettings(0.3),
        AttentionSettings(0.3, window=3),
        AttentionSettings(0.3, softcap=1.5),
        AttentionSettings(0.3, window=5, sinks=torch.tensor([0.3, -1.0, 2.0, 0.1])),
    ],
)
@pytest.mark.parametrize("value_dim", [8, 6])
def test_attention_within_documents_is_its_formula(form, value_dim):
    g = torch.Generator().manual_seed(1)
    lengths = (4, 7, 1, 4, 9)
    documents = Documents(lengths, torch.device("cpu"))
    q, k, v = (
        torch.randn(1, h, sum(lengths), d, generator=g, dtype=torch.float64, requires_grad=True)
        for h, d in ((4, 8), (2, 8), (2, value_dim))
    )
    doc, at = documents.document, torch.cat([torch.arange(n) for n in lengths])
    seen = (doc[:, None] == doc) & (at[:, None] >= at) & (at[:, None] - at < (form.window or 99))
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * form.scaling
    scores = scores if form.softcap is None else form.softcap * torch.tanh(scores / form.softcap)
    weights = scores.exp() * seen
    total = weights.sum(-1, keepdim=True) + (0 if form.sinks is None else form.sinks.double().exp().view(1, -1, 1, 1))
    reference = (weights / total @ v.repeat_interleave(2, 1)).transpose(1, 2)
    ours = by_document(q, k, v, documents, form)
    up = torch.randn(reference.shape, generator=g, dtype=torch.float64)
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, (q, k, v), up)), (reference, *torch.autograd.grad(reference, (q, k, v), up))
    ):
        assert (a - b).abs().max() < 1e-12 * b.abs().max()


def test_other_batches_are_stock_bit_for_bit():
    """One document, several rows, positions that only go up: stock's attention is called with what it was given."""
    stock, ours = pm.build("full"), pm.build("full")
    fastft.patch(ours)
    unpacked = fastft.patch(pm.build("full"))
    from fastft.packing.hooks import release
    from fastft.swapping.swap import uninstall

    release(unpacked, unpacked)
    for m in unpacked.modules():
        uninstall(m, "packed attention")
    ids = torch.randint(3, pm.VOCAB, (2, 8), generator=torch.Generator().manual_seed(2))
    for more in ({}, {"attention_mask": torch.ones_like(ids)}, {"position_ids": torch.arange(3, 11)[None]}):
        batch = pm.step({"input_ids": ids, "labels": ids, **more})
        same_bits(run(ours, batch), run(unpacked, batch))
        for m in (ours, unpacked):
            m.zero_grad(set_to_none=True)
    assert not fastft.report(ours).fallbacks and not packed_notes(ours)
    assert ours.config._attn_implementation == stock.config._attn_implementation == "sdpa"


def test_what_the_user_chose_stays():
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    model = fastft.patch(LlamaForCausalLM._from_config(LlamaConfig(**pm.SIZES), attn_implementation="eager").train())
    run(model, pm.step(pm.packed_batch(pm.documents())))
    assert fastft.report(model).fallbacks == {
        "a packed row: the attention implementation is eager, which was chosen and stays": 1
    }


@pytest.mark.parametrize("why", ["cache", "hidden states", "dropout", "switched", "hook"])
def test_what_goes_the_stock_way_is_counted(why):
    model = fastft.patch(pm.build("full"))
    batch = pm.packed_batch(pm.documents())
    if why == "cache":
        batch["use_cache"] = True
    if why == "hidden states":
        batch["output_hidden_states"] = True
    if why == "dropout":
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
    if why == "switched":
        model.set_attn_implementation("eager")
    if why == "hook":
        model.model.layers[0].register_forward_hook(lambda m, a, out: None)
    run(model, pm.step(batch))
    (reason,) = fastft.report(model).fallbacks
    assert reason.startswith("a packed row: ")


def test_undo_copy_and_pickle():
    plain = pm.build("full")
    model = pm.build("full")
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    fastft.patch(model)
    batch = pm.step(pm.packed_batch(pm.documents()))
    first = run(model, batch)
    model.zero_grad(set_to_none=True)
    other = copy.deepcopy(model)
    same_bits(run(other, batch), first)
    assert packed_notes(other) and packed_notes(model)
    loaded = pickle.loads(pickle.dumps(model)).train()
    run(loaded, batch)  # a stock model
    fastft.unpatch(model)
    for n, m in model.named_modules():
        assert m.__dict__.keys() == before[n].keys() and type(m).__module__.startswith(("transformers", "torch")), n
    model.zero_grad(set_to_none=True)
    same_bits(run(model, batch), run(plain, batch))


def test_a_mask_that_is_read_says_so():
    mask = DocumentMask.of(Documents((2, 3), torch.device("cpu")))
    assert mask.shape == (1, 1, 5, 5) and mask.to("cpu") is mask and mask[:, :, :, :5] is mask and mask.detach() is mask
    for read in (lambda: mask + 1, lambda: mask[..., :3], lambda: torch.where(mask, 1.0, 0.0), mask.float):
        with pytest.raises(MaskReadError):
            read()


def test_under_fake_tensors_it_steps_aside():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks.fake import to_fake

    model = fastft.patch(pm.build("full"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_fake(model)
        ids = torch.zeros(2, 8, dtype=torch.long)
        model.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    assert not packed_notes(model)
