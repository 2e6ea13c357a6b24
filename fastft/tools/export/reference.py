"""Base + adapter's own answers in float32, and what rounding alone makes of them.

A server multiplies rounded weights with rounded inputs: F16, BF16, or blocks of 8-bit integers. The same roundings put
around every linear layer of the reference give the size of error that a precision explains; what differs by more is a
mistake in the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Answers:
    """logits: of all positions of all rows. stages: activations of the first row by name, in the order in which they
    are computed."""

    logits: torch.Tensor
    stages: dict[str, torch.Tensor]


# llama.cpp's names of a layer's activations, and what they are called to a user
STAGES = (
    ("attn_norm-{}", "layer {}, the norm before attention"),
    ("ffn_norm-{}", "layer {}, attention"),
    ("l_out-{}", "layer {}, MLP"),
)
FINAL = (("result_norm", "the norm after the last layer"), ("result_output", "the head"))
FIRST = (("embd", "the embedding"), ("inp_scaled", "the embedding"))


def spoken(stage: str) -> str:
    """A stage in words."""
    known = {**dict(FIRST), **dict(FINAL)}
    name, _, layer = stage.partition("-")
    return known.get(stage) or dict(STAGES)[f"{name}-{{}}"].format(layer)


def decoder_of(model: Any) -> Any:
    """The module that holds the layers and the norm after them."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.get_decoder()


@torch.no_grad()
def logits_of(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Of all positions of all rows, one after the other, [positions, vocabulary]."""
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0].float() for row in rows])


@torch.no_grad()
def run(model: Any, rows: list[list[int]]) -> Answers:
    """Args:
    model: in float32, its decoder of layers with self_attn and mlp.
    rows: token ids."""
    decoder, seen = decoder_of(model), {}

    def keep(name: str, t: torch.Tensor) -> None:
        seen.setdefault(name, t.detach()[0].float().clone())

    first = lambda out: out[0] if isinstance(out, tuple) else out
    hooks = []
    for i, layer in enumerate(decoder.layers):
        names = [n.format(i) for n, _ in STAGES]
        into = lambda name: lambda m, args, kwargs: keep(name, args[0] if args else kwargs["hidden_states"])
        hooks.append(layer.self_attn.register_forward_pre_hook(into(names[0]), with_kwargs=True))
        hooks.append(layer.mlp.register_forward_pre_hook(lambda m, args, n=names[1]: keep(n, args[0])))
        hooks.append(layer.register_forward_hook(lambda m, args, out, n=names[2]: keep(n, first(out))))
    hooks.append(
        decoder.layers[0].register_forward_pre_hook(
            lambda m, args, kwargs: keep("embd", args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    hooks.append(decoder.norm.register_forward_hook(lambda m, args, out: keep("result_norm", out)))
    logits = []
    try:
        for row in rows:
            logits.append(model(input_ids=torch.tensor([row])).logits[0].float())
            keep("result_output", logits[-1][None])
    finally:
        for h in hooks:
            h.remove()
    seen["inp_scaled"] = seen["embd"]
    order = ["embd", "inp_scaled", *(n.format(i) for i in range(len(decoder.layers)) for n, _ in STAGES)]
    return Answers(torch.cat(logits), {n: seen[n] for n in [*order, *(n for n, _ in FINAL)]})


@torch.no_grad()
def greedy(model: Any, prompt: list[int], new: int, stops: list[int]) -> list[int]:
    """At most `new` ids after the prompt, the likeliest each time, up to one of `stops`, which is among them."""
    ids = torch.tensor([prompt])
    for _ in range(new):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        if int(ids[0, -1]) in stops:
            break
    return ids[0, len(prompt) :].tolist()


@contextmanager
def rounded(model: Any, quant: str) -> Iterator[None]:
    """Within, every linear layer and embedding of the (merged) model rounds its weight as `quant` stores it, and its
    input as llama.cpp does for that type."""
    hooks: list[Any] = []
    linears: list[Any] = [m for m in model.modules() if type(m) is nn.Linear]
    for module in linears:
        module.forward = lambda x, m=module: nn.functional.linear(
            round_input(x, quant), round_weight(m.weight, quant), m.bias
        )
    for module in (m for m in model.modules() if isinstance(m, nn.Embedding)):
        hooks.append(module.register_forward_hook(lambda m, args, out: _embedded(m, args[0], out, quant)))
    try:
        yield
    finally:
        for module in linears:
            del module.forward
        for hook in hooks:
            hook.remove()


def _embedded(module: Any, ids: torch.Tensor, out: Any, quant: str) -> torch.Tensor:
    plain = module.weight[ids]
    scale = out / plain.where(plain != 0, torch.ones_like(plain))  # an embedding may be scaled in its own forward
    return torch.where(plain != 0, round_weight(plain, quant) * scale, out)


def round_weight(t: torch.Tensor, quant: str) -> torch.Tensor:
    """As the file stores it. A K-quant's weights are taken from the file instead."""
    if quant == "f32" or quant.endswith(("_k", "_k_s", "_k_m", "_k_l")):
        return t
    if quant in ("f16", "bf16"):
        return t.to(torch.float16 if quant == "f16" else torch.bfloat16).float()
    return _blocks(t, 32) if t.shape[-1] % 32 == 0 else t.half().float()


def round_input(t: torch.Tensor, quant: str) -> torch.Tensor:
    """As llama.cpp rounds what it multiplies with such weights."""
    if "_k" in quant:
        return _blocks(t, 256 if t.shape[-1] % 256 == 0 else 32)
    return round_weight(t, quant)


def _blocks(t: torch.Tensor, size: int) -> torch.Tensor:
    """Blocks of 8-bit integers with a scale each."""
    blocks = t.reshape(*t.shape[:-1], -1, size)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    integers = torch.where(scale > 0, blocks / scale, torch.zeros_like(blocks)).round()
    return (integers * (scale.half().float() if size == 32 else scale)).reshape(t.shape)
