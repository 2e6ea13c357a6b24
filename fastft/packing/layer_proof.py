"""Proof that a model treats a row of documents as it treats the documents.

That attention within documents is right is one question (attention.py). That nothing else in the model looks beyond a
token, counts tokens, or reads the mask is another, and only a run answers it. The whole stack of layers is run at its
real depth and width, in float64, on a few dozen tokens, stock against ours, with all gradients. So that this costs no
memory, a copy is run in which linear layers are of rank 8 and embeddings have 64 rows, all random: they treat each
token by itself whatever their weights. Windows are made short enough for the few tokens to reach over them."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from fastft.compat.accelerate_private import LEFT_BY_HOOKS
from fastft.compat.transformers_private import (
    attention_implementation,
    experts_implementation,
    set_experts_implementation,
)
from fastft.packing.batch import Labels, Unpadded, packed, unpadded
from fastft.packing.documents import DocumentMask
from fastft.packing.interface import KIND, attentions, teach
from fastft.patching.sharded import as_if_whole
from fastft.proving.clone import clone
from fastft.proving.proof_cache import proof_of
from fastft.proving.prove import Proof, agree, cast_parameters, outputs_and_gradients, undisturbed
from fastft.swapping.out_of_memory import not_for_want_of_memory
from fastft.swapping.rebind import innermost
from fastft.swapping.swap import KEY, slot_of, stock_class

RANK, ROWS, WINDOW = 8, 64, 5
LIMIT = 2**30  # bytes that a copy may take in float64
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
# others depend on lengths unseen here
MASKS = frozenset({"create_causal_mask", "create_sliding_window_causal_mask", "create_bidirectional_mask"})
PADDED = ((0, 16), (0, 9), (5, 16), (4, 11), (15, 16))  # first and last + 1 real position of each row
PACKED = (1, 7, 9, 12, 1, 7)


class _LowRankLinear(nn.Module):
    """A linear layer of rank 8."""

    bias: torch.Tensor | None

    def __init__(self, n_in: int, n_out: int, bias: bool, device: torch.device, generator: torch.Generator):
        super().__init__()
        draw = lambda *shape: nn.Parameter(torch.randn(shape, generator=generator).to(device))
        self.down, self.up = draw(RANK, n_in), draw(n_out, RANK)
        # no gradient is asked for: a key's may be zero but for rounding
        self.register_buffer("bias", draw(n_out).detach() if bias else None)
        self.in_features, self.out_features = n_in, n_out
        with torch.no_grad():
            self.down.mul_(n_in**-0.5)
            self.up.mul_(RANK**-0.5)

    @property
    def weight(self) -> torch.Tensor:
        return self.up @ self.down

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        y = x.to(self.down.dtype) @ self.down.T @ self.up.T
        return y if self.bias is None else y + self.bias


def _bottom(module: nn.Module) -> nn.Module:
    while isinstance(base := module._modules.get("base_layer"), nn.Module):
        module = base
    return module


def _stand_in(module: nn.Module, device: torch.device, generator: torch.Generator) -> nn.Module | None:
    bottom = _bottom(module)
    if isinstance(bottom, nn.Embedding):
        new: Any = clone_of_one(bottom)
        new._parameters["weight"] = nn.Parameter(
            torch.randn(ROWS, bottom.embedding_dim, generator=generator).to(device)
        )
        new.num_embeddings = ROWS
        new.padding_idx = None
        return new
    n_in, n_out = getattr(bottom, "in_features", None), getattr(bottom, "out_features", None)
    if type(n_in) is int and type(n_out) is int:
        return _LowRankLinear(n_in, n_out, getattr(bottom, "bias", None) is not None, device, generator)
    return None


def clone_of_one(module: nn.Module) -> nn.Module:
    """A stock copy of a leaf: its parameters are the original's."""
    cls: Any = stock_class(module)
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    new._parameters, new._modules = dict(module._parameters), {}
    return bare(new)


def bare(module: nn.Module) -> nn.Module:
    """The module as its class made it: without swap, hooks, or a forward bound on the instance."""
    if (slot := slot_of(module)) is not None:
        module.__class__ = slot.stock
    for name in (KEY, "forward", *LEFT_BY_HOOKS):
        module.__dict__.pop(name, None)
    for name, value in module.__dict__.items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
            module.__dict__[name] = type(value)()
    return module


def head_of(base: Any) -> nn.Module | None:
    """The output embedding; None where there is none, or the model does not say."""
    try:
        return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    except NotImplementedError:
        return None


def small_copy(owner: nn.Module, vocabulary: int | None = None) -> nn.Module | str:
    """The copy that is run; or why there is none. vocabulary: of its head and its configuration, whose padding's id is
    then 0."""
    device = next((p.device for p in owner.parameters()), torch.device("cpu"))
    if any(
        hasattr(p, "ds_id") or type(p.data) is not torch.Tensor or p.device.type == "meta"
        for p in owner.parameters()
        if p.is_floating_point()
    ):
        return "its parameters are sharded or offloaded"
    generator = torch.Generator().manual_seed(5)
    memo: dict[int, object] = {}
    inside: set[nn.Module] = set()
    head = head_of(owner)
    heads = set() if head is None else set(head.modules())
    for module in owner.modules():
        if module not in inside and (new := _stand_in(module, device, generator)) is not None:
            if vocabulary is not None and isinstance(new, _LowRankLinear) and module in heads:
                new = _LowRankLinear(new.in_features, vocabulary, new.bias is not None, device, generator)
            memo[id(module)] = new
            inside.update(module.modules())
    rest = sum(
        8 * p.numel() for m in owner.modules() if m not in inside for p in m._parameters.values() if p is not None
    )
    if rest > LIMIT:
        return f"{rest / 2**30:.0f} GiB of its parameters are in no linear layer, and the proof would copy them"
    new = clone(owner, memo)
    configs: dict[int, object] = {}
    for module in new.modules():
        bare(module)
        for name, value in list(module.__dict__.items()):
            if name in WINDOWS and type(value) is int:
                module.__dict__[name] = min(value, WINDOW)
            elif vocabulary is not None and name == "vocab_size":
                module.__dict__[name] = vocabulary
            elif hasattr(value, "to_json_string"):
                if id(value) not in configs:
                    configs[id(value)] = _short(copy.deepcopy(value), vocabulary)
                module.__dict__[name] = configs[id(value)]
    return new.eval()


def _short(config, vocabulary: int | None = None):
    if vocabulary is not None and hasattr(config, "get_text_config"):
        for c in {id(c): c for c in (config, config.get_text_config())}.values():
            c.vocab_size, c.pad_token_id = vocabulary, 0
    if experts_implementation(config) not in (None, "eager"):
        set_experts_implementation(config, "eager")  # the grouped products know no float64
    for name in WINDOWS:
        if type(value := getattr(config, name, None)) is int:
            setattr(config, name, min(value, WINDOW))
    return config


class _Run(nn.Module):
    """The copy's last hidden state, in the order of the row. Stock's: of the padded batch, where there is one, else of
    each document by itself. (Stock's own packed row is not asked: where a family forgets to hand on the positions, it
    attends across documents.)"""

    def __init__(self, owner: nn.Module, stock: list[dict], padding: Unpadded | None, ours: dict):
        super().__init__()
        self.owner, self.stock, self.padding, self.ours, self.is_ours = owner, stock, padding, ours, False

    def _hidden(self, given: dict) -> torch.Tensor:
        out = self.owner(**given)
        if any(isinstance(v, torch.Tensor) for n, v in out.items() if n != "last_hidden_state"):
            raise ValueError("it returns more than its last hidden state")
        return out.last_hidden_state

    def forward(self) -> torch.Tensor:
        if self.is_ours:
            return self._hidden(self.ours)
        h = torch.cat([self._hidden(given) for given in self.stock], 1)
        return h if self.padding is None else self.padding.gather(h)


def _swap(run: Any) -> None:
    run.is_ours = True
    for module in attentions(run.owner):
        if why := teach(module):
            raise ValueError(why)


def _packed_batch(device: torch.device) -> tuple[list[dict], None, dict]:
    n, generator = sum(PACKED), torch.Generator().manual_seed(11)
    ids = torch.randint(0, ROWS, (1, n), generator=generator).to(device)
    positions = torch.cat([torch.arange(m) for m in PACKED])[None].to(device)
    documents = packed(positions)
    assert documents is not None
    alone = [
        {"input_ids": i, "position_ids": p, "use_cache": False}
        for i, p in zip(ids.split(PACKED, 1), positions.split(PACKED, 1))
    ]
    return (
        alone,
        None,
        {"input_ids": ids, "position_ids": positions, "use_cache": False, "attention_mask": DocumentMask.of(documents)},
    )


def padded_batch(pad_id: int | None, device: torch.device) -> tuple[list[dict], Unpadded, dict]:
    """A batch padded on both sides, how it is unpadded, and what more a proof asks of it."""
    mask = torch.zeros(len(PADDED), PADDED[0][1], dtype=torch.long)
    for i, (a, b) in enumerate(PADDED):
        mask[i, a:b] = 1
    ids = torch.randint(0, ROWS, mask.shape, generator=torch.Generator().manual_seed(11))
    ids[mask == 0] = pad_id if pad_id is not None and 0 <= pad_id < ROWS else 0
    given = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    padding = unpadded(given["attention_mask"], Labels(), None, None)
    assert isinstance(padding, Unpadded)
    return [given], padding, padding.arguments(given)


def _mask_makers(owner: nn.Module) -> set[str]:
    """Global names of transformers' mask functions that the owner's forward refers to."""

    def names(code) -> set[str]:
        return set(code.co_names).union(*(names(c) for c in code.co_consts if hasattr(c, "co_names")))

    return {n for n in names(innermost(stock_class(owner).forward).__code__) if n.startswith("create_") and "mask" in n}


def layer_proof(owner: Any, kind: str) -> Proof:
    """kind: "packed" or "padded". One proof for each configuration, in the process."""
    others = sorted(_mask_makers(owner) - MASKS)
    if others:
        return Proof(False, reason=f"its masks come from {', '.join(others)}")
    config, first = owner.config, next(owner.parameters())
    classes = tuple(stock_class(m) for m in owner.modules() if not hasattr(m, "base_layer"))
    key = (
        kind,
        classes,
        config.to_json_string(use_diff=False),
        attention_implementation(config),
    )
    return proof_of(KIND, (*key, first.dtype), first.device, lambda: _prove(owner, kind))


def _prove(owner: nn.Module, kind: str) -> Proof:
    with undisturbed(), as_if_whole(owner):
        new = small_copy(owner)
        if isinstance(new, str):
            return Proof(False, reason=new)
        device = next(new.parameters()).device
        run = _Run(
            new,
            *(
                _packed_batch(device)
                if kind == "packed"
                else padded_batch(getattr(owner.config, "pad_token_id", None), device)
            ),
        )
        try:
            with torch.no_grad():
                run()
        except Exception as e:  # what stock cannot run here is not judged
            return Proof(False, reason=f"stock raised {type(e).__name__} in the proof: {e}")
        for p in new.parameters():
            p.requires_grad_(p.is_floating_point())
        exact, ours = cast_parameters(run, torch.float64), cast_parameters(run, torch.float64)
        reference = outputs_and_gradients(exact, [], exact.named_parameters(), 91, True)
        try:
            _swap(ours)
            found = outputs_and_gradients(ours, [], ours.named_parameters(), 91, True)
        except Exception as e:
            not_for_want_of_memory(e)
            return Proof(False, dtype="float64", reason=f"{type(e).__name__}: {e}")
        reason = agree(found, reference)
        error = (
            max(float((found[n] - t).abs().max() / t.abs().max().clamp_min(1e-300)) for n, t in reference.items())
            if not reason
            else math.nan
        )
        return Proof(not reason, error, 0.0, "float64", reason)
