"""Python and C calls that a decoder layer costs the interpreter, counted with `sys.setprofile`: they do not depend on
the machine. The difference between a model of 6 layers and one of 2, divided by 4. And those of `fastft.patch`, all
proofs included, for a model of 32 layers and one of 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft.proving.proof_cache import CACHE

TARGETS: dict[str, str | list[str]] = {"LoRA on all linears": "all-linear", "LoRA on q and v": ["q_proj", "v_proj"]}

PER_LAYER = {"norm": 2, "rotary": 1, "mlp": 1, "linear group": 7}  # swaps; a norm more stands behind the layers


def _model(layers: int, targets: str | list[str]) -> torch.nn.Module:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=targets)).train()


def _counted(function: Callable[[], object]) -> tuple[int, object]:
    calls = 0

    def count(frame, event: str, argument) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return calls, result


def _of_model(model: torch.nn.Module, gradients: bool) -> tuple[int, int]:
    """(forward, backward) of the third step."""
    ids = torch.arange(8)[None]

    def forward():
        with torch.set_grad_enabled(gradients):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    for _ in range(3):
        loss = forward()
        if gradients:
            loss.backward()
    there, loss = _counted(forward)
    return there, _counted(loss.backward)[0] if gradients else 0


def calls(targets: str, patched: bool, gradients: bool) -> tuple[float, float]:
    """(forward, backward) calls a layer. Raises AssertionError where a kind of module is not swapped."""
    found = []
    for layers in (2, 6):
        model = _model(layers, TARGETS[targets])
        if patched:
            fastft.patch(model)
            rows = fastft.report(model)
            count = {k: sum(r.count for r in rows if r.kind == k and r.is_swapped) for k in ("norm", "rotary", "mlp")}
            groups = sum(r.count for r in rows if r.kind == "linear group" and r.is_swapped)
            assert count == {"norm": 2 * layers + 1, "rotary": layers, "mlp": layers}, count
            assert groups == 7 * layers, groups
        found.append(_of_model(model, gradients))
    (a, b), (c, d) = found
    return (c - a) / 4, (d - b) / 4


def of_patch(layers: int, targets: str = "LoRA on all linears") -> tuple[int, int]:
    """(calls, proofs) of patching a model of that many layers, in a process that has proven nothing yet. Raises
    AssertionError where a kind of module is not swapped in every layer."""
    fastft.patch(_model(1, TARGETS[targets]))  # what a process does once beside proofs
    model, known = _model(layers, TARGETS[targets]), dict(CACHE)
    CACHE.clear()
    try:
        count, _ = _counted(lambda: fastft.patch(model))
        proofs = len(CACHE)
    finally:
        CACHE.update(known)
    swapped = {k: sum(r.count for r in fastft.report(model).swapped if r.kind == k) for k in PER_LAYER}
    assert swapped == {k: n * layers + (k == "norm") for k, n in PER_LAYER.items()}, swapped
    return count, proofs
