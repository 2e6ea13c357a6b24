"""TRL's fused head runs on fastft's function for this model only, bound before or after the patch, and is given back
exactly."""

import copy

import pytest
import torch
import trl.trainer.utils as trl_utils
from accelerate.utils.operations import ConvertOutputsToFp32
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig
from trl.trainer.utils import add_fused_lm_head

import fastft
from fastft.lm_head import trl_head
from fastft.proving import proof_cache as proofs
from fastft.proving.float64 import float64_reference
from fastft.proving.prove import Proof
from fastft_kernels.numerics import compare

SIZES = dict(
    vocab_size=211,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
IDS = torch.arange(24).view(2, 12) % 211


def build(lora=True, config=LlamaConfig, head=True, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES), attn_implementation="eager")
    if head:
        add_fused_lm_head(model, **settings)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        for n, p in model.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.1)
    return model


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_ours(model):
    functions = [f for f, _ in trl_head.places(base_of(model).__dict__, "forward")]
    return [f.__globals__[trl_head.NAME] is trl_head.FusedHead for f in functions] == [True]


def step(model, reference=False):
    labels = IDS.masked_fill(IDS % 5 == 0, -100)
    out = model(input_ids=IDS, labels=labels, fused_lm_head=True)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out.loss, list(parameters.values()), allow_unused=True)
    return {"loss": out.loss.detach(), "log_probs": out.log_probs.detach()} | {
        n: g for n, g in zip(parameters, grads) if g is not None
    }


@pytest.mark.parametrize("config", [LlamaConfig, Gemma2Config])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_results_and_gradients(config, lora, when):
    settings = dict(temperature=0.8, outputs=("log_probs", "entropy", "is_top1"))
    stock, model = build(lora, config, **settings), build(lora, config, head=when == "before", **settings)
    fastft.patch(model)
    if when == "after":
        add_fused_lm_head(base_of(model), **settings)
        step(model)
    assert is_ours(model) and not is_ours(stock)
    with float64_reference():
        reference = {k: v.double() for k, v in step(build(lora, config, **settings).double()).items()}
    curve = lambda r: {k: r[k] for k in ("loss", "log_probs")}
    verdict = compare(curve(step(model)), curve(reference), curve(step(stock)))
    assert verdict, str(verdict)
    ours, eager = step(model), step(stock)
    flat = lambda r: torch.cat([v.flatten() / reference[k].abs().max() for k, v in r.items()])
    verdict = compare(flat(ours), flat(reference), flat(eager))
    assert verdict, str(verdict)


def test_bound_by_the_first_step_under_peft_and_reported(monkeypatch):
    calls, real = [], trl_head.linear_logprob
    monkeypatch.setattr(trl_head, "linear_logprob", lambda h, *a, **k: (calls.append(len(h)), real(h, *a, **k))[1])
    model = fastft.patch(build(head=False))
    add_fused_lm_head(base_of(model))
    model(input_ids=IDS, labels=IDS, fused_lm_head=True).loss.backward()
    assert calls[-1] == 22  # 2 rows of 11 targets: the model's own first step, after the small cases of the proof
    assert {r.kind: r.kernel for r in fastft.report(model).swapped}["fused head"] == "linear_logprob"


def test_undo_is_exact_and_other_models_keep_theirs():
    model, other = build(), build()
    before, keys = base_of(model).__dict__["forward"], [list(m.__dict__) for m in model.modules()]
    private = trl_utils._ChunkedLogProbFunction
    logits = model(input_ids=IDS).logits
    fastft.patch(model)
    copied = copy.deepcopy(model)
    assert is_ours(model) and not is_ours(other) and trl_utils._ChunkedLogProbFunction is private
    assert model(input_ids=IDS).logits.shape == logits.shape
    fastft.unpatch(model)
    assert base_of(model).__dict__["forward"] == before and [list(m.__dict__) for m in model.modules()] == keys
    assert not any(m._forward_pre_hooks for m in model.modules()) and torch.equal(model(input_ids=IDS).logits, logits)
    assert isinstance(next(iter(base_of(copied)._forward_pre_hooks.values())), trl_head.Watch)


def test_found_inside_accelerates_wrappers():
    import types

    model = build(lora=False)
    inner = torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)(model.forward.__func__)
    model.forward = types.MethodType(inner, model)
    wrapped = ConvertOutputsToFp32(model.forward.__func__)

    def forward(*args, **kwargs):
        return wrapped(*args, **kwargs)

    model.forward = types.MethodType(forward, model)
    fastft.patch(model)
    assert is_ours(model)
    step(model)
    fastft.unpatch(model)
    assert not is_ours(model)


def test_a_failed_proof_keeps_trls_own(monkeypatch):
    monkeypatch.setattr(proofs, "CACHE", {})
    monkeypatch.setattr(trl_head, "prove", lambda *args: Proof(False, reason="planted"))
    model = fastft.patch(build())
    assert not is_ours(model)
    assert [r.reason for r in fastft.report(model).stock if r.kind == "fused head"] == ["planted"]


def test_the_proof_sees_a_small_error(monkeypatch):
    real = trl_head.linear_logprob
    monkeypatch.setattr(trl_head, "linear_logprob", lambda h, *a, **k: real(h * 1.00001, *a, **k))
    assert not trl_head.prove(
        trl_utils._ChunkedLogProbFunction, trl_head.FusedHead, 24, 97, torch.float32, torch.device("cpu")
    ).ok
