"""Tiny Llamas with adapters, and `both`: the same step on a stock and a patched model from the same state, judged
against float64.

Whole models are judged per kind of result: every tensor is divided by the largest true value in it, and all losses and
outputs are one vector to the judge, all gradients another. So a defect in the smallest adapter shows, and a lucky
rounding of stock in it does not fail us. Four batches are judged as one, so that no single rounding decides, whatever
kernels the machine's products take. Widths are multiples of a 4-bit weight's block: elsewhere bitsandbytes is wrong on
some CPUs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft.linear.group_proof import dense_in_float64
from fastft.proving.float64 import float64_reference
from fastft_kernels.numerics import Verdict, compare

VOCAB, HIDDEN, LAYERS = 48, 64, 2
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DRAWS = 4
Results = dict[str, torch.Tensor]
_DRAW = [0]  # the batch that `tokens` gives inside `run`


SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    use_cache=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def llama(dtype: torch.dtype = torch.float32, *, layers: int = LAYERS, seed: int = 0, **config) -> LlamaForCausalLM:
    """A Llama of hidden size 64, in training mode, biases drawn where it has any."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": layers} | config))
    for name, p in model.named_parameters():  # wide enough that attention and activation are far from linear
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.2)
        elif p.dim() == 2:
            nn.init.normal_(p, std=0.85 * HIDDEN**-0.5)
    return model.to(dtype).train()


def quantised(
    model: nn.Module, *, kind: str = "nf4", compute: torch.dtype | None = torch.float32, double: bool = False, **more
) -> nn.Module:
    """Every linear but the head in 4 bits, as transformers' loader leaves it."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear and name != "lm_head":
                parent._modules[name] = linear_4bit(child, kind, compute, double, **more)
    model.is_loaded_in_4bit = True
    return model


def linear_4bit(dense: nn.Linear, kind: str, compute, double: bool, storage: torch.dtype = torch.uint8) -> nn.Module:
    new = bnb.nn.Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=dense.bias is not None,
        compute_dtype=compute,
        compress_statistics=double,
        quant_type=kind,
        quant_storage=storage,
    )
    new.weight = bnb.nn.Params4bit(
        dense.weight.data,
        requires_grad=False,
        compress_statistics=double,
        quant_type=kind,
        quant_storage=storage,
        module=new,
    )
    if dense.bias is not None:
        new.bias = nn.Parameter(dense.bias.data.clone(), requires_grad=False)
    new.support_avx512bf16_for_cpu = False  # the same on every CPU; test_lora_precision.py asks for the other sort
    return new.to("cpu")


def adapted(
    model: nn.Module, *, fp32: bool = True, dropout: float = 0.0, r: int = 4, seed: int = 1, **config
) -> nn.Module:
    """A PEFT model; B and lora_bias are drawn, so that no gradient is zero."""
    torch.manual_seed(seed)
    settings = dict(r=r, lora_alpha=8, lora_dropout=dropout, target_modules=ALL, task_type="CAUSAL_LM")
    model = get_peft_model(model, LoraConfig(**settings | config), autocast_adapter_dtype=fp32)
    return drawn(model).train()


def drawn(model: nn.Module, seed: int = 2, std: float = 0.1) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * std)
    return model


def dense(dtype: torch.dtype = torch.float32, *, config: dict | None = None, **lora) -> nn.Module:
    return adapted(llama(dtype, **(config or {})), **lora)


def nf4(
    dtype: torch.dtype = torch.float32, *, config: dict | None = None, quant: dict | None = None, **lora
) -> nn.Module:
    model = llama(dtype, **(config or {}))
    return adapted(quantised(model, **{"compute": dtype} | (quant or {})), **lora)


BASES = {"dense": dense, "nf4": nf4}


def tokens(rows: int = 1, n: int = 16, seed: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, n), generator=torch.Generator().manual_seed(seed + 100 * _DRAW[-1]))


def gradients(model: nn.Module) -> Results:
    return {f"d {n}": p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def train_step(model: nn.Module, ids: torch.Tensor | None = None, **more) -> Results:
    """Loss, logits and every parameter's gradient of one step."""
    ids = tokens() if ids is None else ids
    out = model(input_ids=ids, labels=ids, **more)
    out.loss.backward()
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **gradients(model)}


def in_float64(model: nn.Module) -> nn.Module:
    return dense_in_float64(copy.deepcopy(model), torch.float64)


@contextlib.contextmanager
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        yield


def run(model: nn.Module, step: Callable[[nn.Module], Results], reference: bool = False, draws: int = 1) -> Results:
    """The step's results. draws > 1: of so many batches, each on a copy of the model."""
    out = {}
    for i in range(draws):
        _DRAW.append(i)
        try:
            with _seeded(), float64_reference() if reference else contextlib.nullcontext():
                results = step(model if draws == 1 else copy.deepcopy(model))
                out |= {f"{k}{f' ({i})' if i else ''}": v.detach().clone() for k, v in results.items()}
        finally:
            _DRAW.pop()
    return out


def _pooled(results: Results, reference: Results) -> tuple[torch.Tensor, torch.Tensor]:
    """(each tensor over the largest true value in it, over all batches, the same of the reference), as two vectors."""
    name, scale = lambda k: k.split(" (")[0], {}
    for k, t in reference.items():
        scale[name(k)] = max(scale.get(name(k), 0.0), float(t.abs().max()))
    flat = lambda r: torch.cat([(r[k].double() / (scale[name(k)] or 1.0)).reshape(-1) for k in reference])
    return flat(results), flat(reference)


def judge(ours: Results, reference: Results, eager: Results) -> Verdict:
    """The judge on outputs together and on gradients together. Keys, shapes and dtypes must be stock's."""
    assert ours.keys() == eager.keys() == reference.keys(), sorted(
        ours.keys() ^ eager.keys() | ours.keys() ^ reference.keys()
    )
    worst = None
    for part in ("", "d "):
        keys = [k for k in reference if k.startswith("d ") == bool(part)]
        for k in keys:
            assert ours[k].dtype == eager[k].dtype and ours[k].shape == eager[k].shape, (
                k,
                ours[k].dtype,
                eager[k].dtype,
            )
        if not keys:
            continue
        dtype = min((eager[k].dtype for k in keys), key=lambda d: torch.finfo(d).bits)
        dtype = dtype if dtype != torch.float64 else torch.float32
        t = {k: reference[k] for k in keys}
        (o, flat), (e, _) = _pooled(ours, t), _pooled(eager, t)
        verdict = compare(_labelled(o, dtype), flat, _labelled(e, dtype), "gradients" if part else "outputs")
        if not verdict:
            off = {k: float((ours[k].double() - t[k]).abs().max() / (t[k].abs().max() or 1.0)) for k in keys}
            raise AssertionError(f"{verdict}; worst: {sorted(off.items(), key=lambda kv: -kv[1])[:4]}")
        worst = verdict if worst is None or verdict.error > worst.error else worst
    assert worst is not None
    return worst


def _labelled(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 vectors go to the judge as float32; lower dtypes were rounded already and dividing them must not round
    again."""
    return x.to(torch.float32)


def fallbacks(model: nn.Module) -> dict[str, int]:
    """The calls of linears that went the stock way."""
    return {k: n for k, n in fastft.report(model).fallbacks.items() if k.startswith("linear group")}


def _glance(model: nn.Module) -> Results:
    with torch.no_grad():
        return {"logits": model(tokens()).logits}


def both(
    factory: Callable[[], nn.Module],
    step: Callable[[nn.Module], Results] = train_step,
    *,
    after: Callable[[nn.Module], object] | None = None,
    fast: bool | None = True,
    draws: int = DRAWS,
) -> nn.Module:
    """Run `step` on stock and on patched models from the same state and judge all results; returns the patched model.

    after: what the user does to the model once it is patched (to the stock one as well). fast: linear groups must have
    run without one fallback; False where a call is meant to go the stock way; None where both may happen. draws: of
    batches judged as one."""
    stock, ours = factory(), fastft.patch(factory())
    if after is not None:
        for model in (stock, ours):
            run(model, _glance)  # what the first forward might remember is old by now
            after(model)
    true = in_float64(stock)
    eager = run(stock, step, draws=draws)
    judge(run(ours, step, draws=draws), run(true, step, reference=True, draws=draws), eager)
    if draws > 1:
        run(ours, step)
    went = fallbacks(ours)
    assert fast is None or bool(went) != fast, f"fallbacks: {went}"
    rows = [r for r in fastft.report(ours) if r.kind == "linear group"]
    left = [r for r in rows if not r.is_swapped and r.reason != "an adapter layer of another kind"]
    assert fast is not True or (rows and not left), left
    return ours


def same_bits(a: Results, b: Results) -> None:
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), k


def groups_of(model: nn.Module) -> list:
    from fastft.linear.groups import HOLDER
    from fastft.swapping.swap import slot_of

    slots = [slot_of(m) for m in model.modules()]
    return [g for s in slots if s is not None and HOLDER in s.parts for g, *_ in s.state(HOLDER).groups]
