"""A patched model that is moved or cast is proven again before its next forward."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft.norm import norms
from fastft.patching.moved import MOST, Moved
from fastft.proving import proof_cache
from fastft.proving.float64 import float64_reference
from fastft_kernels.numerics import compare

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
IDS = torch.arange(12).view(2, 6) * 5
KINDS = {"norm", "rotary", "mlp", "linear group", "head"}


def build(dtype=torch.float32):
    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM(CONFIG), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    return model.to(dtype).train()


def step(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def exact():
    with float64_reference():
        return step(build().double())


def dtypes(model):
    return {r.dtype for r in fastft.report(model).swapped}


def kinds(model):
    return {r.kind for r in fastft.report(model).swapped}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_model_is_proven_in_its_new_dtype(dtype):
    ours, stock = fastft.patch(build()), build()
    assert dtypes(ours) == {"float32"}
    ours, stock = ours.to(dtype), stock.to(dtype)
    assert dtypes(ours) == {"float32"}  # nothing was called yet
    found = step(ours)
    assert dtypes(ours) == {str(dtype).removeprefix("torch.")} and kinds(ours) == KINDS
    verdict = compare(found, exact(), step(stock))
    assert verdict, str(verdict)


def test_a_forward_of_a_model_that_stays_proves_nothing(monkeypatch):
    ours = fastft.patch(build())
    step(ours)
    monkeypatch.setattr(Moved, "remember", lambda self: pytest.fail("it was proven again"))
    step(ours)
    ours.eval()(input_ids=IDS)


def test_what_fails_its_new_proof_is_stock_and_says_so(monkeypatch):
    ours, stock = fastft.patch(build()), build().half()
    right = norms.rms_norm
    wrong = lambda x, *a, **k: right(x, *a, **k) * (1.0 if x.dtype != torch.float16 else 1.01)
    monkeypatch.setattr(norms, "rms_norm", wrong)
    monkeypatch.setattr(norms, "rms_norm_with_rstd", lambda x, *a, **k: (wrong(x, *a), norms.rms_norm(x, *a)[..., 0]))
    proof_cache.CACHE.clear()
    found = step(ours.half())
    proof_cache.CACHE.clear()
    assert kinds(ours) == KINDS - {"norm"}
    assert any(r.kind == "norm" and r.reason for r in fastft.report(ours).stock)
    verdict = compare(found, exact(), step(stock))
    assert verdict, str(verdict)


def test_adapters_cast_by_a_trainer_are_proven_too():
    def cast(model):
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.half()
        return model

    proof_cache.CACHE.clear()
    ours = cast(fastft.patch(build()))
    before = {k for k in proof_cache.CACHE if k[0] == "linear group"}
    found = step(ours)
    assert {k for k in proof_cache.CACHE if k[0] == "linear group"} - before
    verdict = compare(found, exact(), step(cast(build())))
    assert verdict, str(verdict)


def test_the_random_stream_stands_where_stocks_does():
    ours, stock = fastft.patch(build()).half(), build().half()
    torch.manual_seed(5)
    step(ours)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    step(stock)
    assert torch.equal(state, torch.get_rng_state())


def test_copies_pickles_and_the_undo():
    ours = fastft.patch(build())
    twin = copy.deepcopy(ours).half()
    step(twin)
    assert dtypes(twin) == {"float16"} and dtypes(ours) == {"float32"}
    assert not any(isinstance(h, Moved) for h in pickle.loads(pickle.dumps(ours))._forward_pre_hooks.values())
    fastft.unpatch(ours)
    assert not any(isinstance(h, Moved) for m in ours.modules() for h in m._forward_pre_hooks.values())


def test_a_model_that_is_cast_at_every_step_is_not_proven_for_ever():
    ours = fastft.patch(build())
    for i in range(MOST + 2):
        step(ours.half() if i % 2 == 0 else ours.float())
    hook = next(h for h in ours._forward_pre_hooks.values() if isinstance(h, Moved))
    assert hook.left == 0


def test_no_work_for_what_only_looks():
    ours = fastft.patch(build())
    given = {"input_ids": IDS, "use_cache": False}
    assert torch.export.export(ours.eval().half(), (), given, strict=False) and dtypes(ours) == {"float32"}


def test_a_patch_inside_a_hook():
    ours = fastft.patch(build())
    ours.get_base_model().register_forward_pre_hook(lambda m, args: (fastft.patch(ours), None)[1], prepend=True)
    verdict = compare(step(ours), exact(), step(build()))
    assert verdict, str(verdict)
