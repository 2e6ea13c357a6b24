"""A patched model that is moved or cast is proven again before its next forward."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft.mlp.recogniser import MLPs
from fastft.norm import norms
from fastft.patching import moved, observe, patcher
from fastft.patching.moved import MOST, NOT_YET, TOO_OFTEN, Moved
from fastft.proving import proof_cache
from fastft.proving.float64 import float64_reference
from fastft.rotary import rotary
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
    assert dtypes(ours) == {"float32"} and NOT_YET in fastft.report(ours).notes  # nothing was called yet
    found = step(ours)
    assert NOT_YET not in fastft.report(ours).notes
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
    monkeypatch.setattr(
        norms, "rms_norm_with_rstd", lambda x, *a, **k: (wrong(x, *a[:2]), norms.rms_norm(x, *a[:2])[..., 0])
    )
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


def test_a_model_that_is_cast_at_every_step_is_stock_at_last():
    ours, stock = fastft.patch(build()), build()
    for i in range(MOST):
        stock = stock.half() if i % 2 == 0 else stock.float()
        step(ours.half() if i % 2 == 0 else ours.float())
    assert kinds(ours) == KINDS
    stock = stock.bfloat16()
    assert all(map(torch.equal, step(ours.bfloat16()), step(stock)))
    assert not kinds(ours) and {r.reason for r in fastft.report(ours).stock} == {TOO_OFTEN}
    fastft.patch(ours)
    assert dtypes(ours) == {"bfloat16"}


def test_no_work_for_what_only_looks():
    ours = fastft.patch(build())
    given = {"input_ids": IDS, "use_cache": False}
    assert torch.export.export(ours.eval().half(), (), given, strict=False) and dtypes(ours) == {"float32"}


def test_a_patch_inside_a_hook():
    ours = fastft.patch(build())
    ours.get_base_model().register_forward_pre_hook(lambda m, args: (fastft.patch(ours), None)[1], prepend=True)
    verdict = compare(step(ours), exact(), step(build()))
    assert verdict, str(verdict)


def test_one_observation_a_move_and_none_for_a_model_that_stays(monkeypatch):
    ours, calls = fastft.patch(build()), []
    observe = patcher.observe
    monkeypatch.setattr(patcher, "observe", lambda *given: (calls.append(1), observe(*given))[1])
    step(ours)
    assert not calls
    step(ours.half())
    step(ours)
    assert len(calls) == 1


def test_a_trainer_that_calls_the_backbone_alone():
    ours = fastft.patch(build()).half()
    ours.get_base_model().model(input_ids=IDS)
    assert dtypes(ours) == {"float16"}


def test_a_second_patch_proves_what_was_moved_before_it():
    ours = fastft.patch(fastft.patch(build()).half())
    assert dtypes(ours) == {"float16"} and kinds(ours) == KINDS


def test_a_rotation_that_fails_runs_nowhere(monkeypatch):
    """The packed attention is made of the forward that the rotation was put into."""
    torch.manual_seed(0)
    ours = fastft.patch(LlamaForCausalLM(CONFIG))
    rope, ran = rotary.rope, []

    def wrong(q, *args, **kwargs):
        ran.append(q.dtype)
        return tuple(t * (1.0 if q.dtype != torch.float16 else 1.05) for t in rope(q, *args, **kwargs))

    monkeypatch.setattr(rotary, "rope", wrong)
    proof_cache.CACHE.clear()
    ours.half()(IDS)
    proof_cache.CACHE.clear()
    assert "rotary" not in kinds(ours)
    ran.clear()
    ours(IDS)
    assert not ran


def test_nothing_is_raised_in_the_callers_forward(monkeypatch):
    def broken(self, module, context):
        raise ZeroDivisionError("a recogniser's own")

    ours, stock = fastft.patch(build()).half(), build().half()
    monkeypatch.setattr(MLPs, "recognise", broken)
    assert all(map(torch.equal, step(ours), step(stock)))
    assert not kinds(ours) and all("a recogniser's own" in r.reason for r in fastft.report(ours).stock)


def test_threads_that_enter_a_moved_model_prove_it_once(monkeypatch):
    ours, calls = fastft.patch(build()).half(), []
    again = moved.prove_again
    monkeypatch.setattr(moved, "prove_again", lambda *given: (calls.append(1), again(*given)))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: ours(input_ids=IDS).logits.detach().clone(), range(2))
    assert len(calls) == 1 and dtypes(ours) == {"float16"}
    assert torch.allclose(first, second, atol=1e-2)


@pytest.mark.parametrize("wrapped", [True, False], ids=["peft", "plain"])
def test_a_thread_that_enters_while_another_proves_waits(monkeypatch, wrapped):
    """The second thread comes while the model's parameters are exchanged for ones without values."""
    ours, entered = fastft.patch(build()).half(), []
    ours = ours if wrapped else ours.get_base_model()
    made = observe.text_inputs
    with ThreadPoolExecutor(1) as pool:

        def in_the_middle(*given):
            entered.append(pool.submit(lambda: ours(input_ids=IDS).logits.detach().clone()))
            assert not wait(entered, timeout=0.3).done  # it stands at the door
            return made(*given)

        monkeypatch.setattr(observe, "text_inputs", in_the_middle)
        first = ours(input_ids=IDS).logits.detach().clone()
        (second,) = (f.result(timeout=60) for f in entered)
    assert dtypes(ours) == {"float16"} and torch.equal(first, second)


def test_a_model_patched_without_values_is_proven_where_it_gets_them():
    with torch.device("meta"):
        ours = LlamaForCausalLM(CONFIG)
    fastft.patch(ours)
    assert kinds(ours) >= {"norm", "mlp", "head"}
    torch.manual_seed(0)
    values = LlamaForCausalLM(CONFIG).half()
    ours.to_empty(device="cpu").half().load_state_dict(values.state_dict())
    ours.model.rotary_emb.inv_freq = values.model.rotary_emb.inv_freq
    ours(IDS)
    assert dtypes(ours) == {"float16"}


def test_another_device_is_another_proof(monkeypatch):
    """What stands for a second device here is another name of the CPU."""
    ours = fastft.patch(build())
    step(ours)
    before = set(proof_cache.CACHE)
    monkeypatch.setattr(proof_cache, "device_key", lambda device: ("second", 9, 0))
    for hook in {h for m in ours.modules() for h in m._forward_pre_hooks.values() if isinstance(h, Moved)}:
        hook.standing = [(ref, name, torch.device("cuda", 0), dtype) for ref, name, _, dtype in hook.standing]
    step(ours)
    new = set(proof_cache.CACHE) - before
    for key in new:
        del proof_cache.CACHE[key]
    assert {k[0] for k in new} >= KINDS and {k[2] for k in new} == {("second", 9, 0)}
    assert {r.device for r in fastft.report(ours).swapped} == {"second sm_90"}
    assert all(r.sizes for r in fastft.report(ours).swapped)
