"""TRL's fused LM head on fastft's function, for one model.

TRL's trainers bind a forward on the model's instance that multiplies the head's weight itself, in tiles, through a
private autograd function which it finds by a global name. Here a copy of that bound forward, over other globals in
which the name means `linear_logprob`, takes its place on this instance (two products instead of three for a frozen
head). TRL's modules stay as they are. Before it does, both are run on small random cases; where the signature or the
numbers differ, TRL's own path stays, and the report says which one runs.

TRL may bind its forward after the patch, and Accelerate may wrap it again: so the model, its backbone and PEFT's
wrappers watch for it with a forward pre-hook, which costs one dictionary look-up. Under PEFT that is before the first
step; a bare model takes its first step through TRL's function and the rest through this one."""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastft.compat.accelerate_private import CALLED
from fastft.compat.trl_private import LOG_PROBS, OUTPUTS
from fastft.lm_head.liger import one_of_each_class, refuse
from fastft.lm_head.trl_head_proof import prove
from fastft.patching.entrances import entrances
from fastft.proving.fingerprint import IdentityKey
from fastft.proving.proof_cache import known_proof, proof_of
from fastft.proving.proof_sizes import head_sizes
from fastft.proving.prove import Proof, undisturbed
from fastft.swapping.rebind import over_globals
from fastft.swapping.release_memory import with_room
from fastft_kernels.lm_head.linear_logprob import linear_logprob

KIND = "fused head"
NAME = LOG_PROBS
KERNEL = "linear_logprob"


class FusedHead:
    """What `_ChunkedLogProbFunction` means in the rebound forward: the same nine arguments, the same five results."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=OUTPUTS):
        device = hidden.device.type
        if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
            hidden = hidden.to(torch.get_autocast_dtype(device))
        wanted = ("log_probs", *(n for n in OUTPUTS if n in outputs))
        head = {"temperature": temperature, "softcap": softcap, "scale": logit_scale}
        r = with_room(linear_logprob, hidden, weight, targets, bias, outputs=wanted, compact=False, **head)
        return r.log_probs, r.entropy, r.log_sum_sq_probs, r.mean_logits, r.is_top1


class Watch:
    """The forward pre-hook: rebinds when TRL's forward is there, refuses Liger's. A copy of the model watches the
    copy."""

    def __init__(self, base: nn.Module):
        self.base, self.samples = weakref.ref(base), None

    def __call__(self, module: nn.Module, args) -> None:
        if not torch.compiler.is_compiling() and (base := self.base()) is not None:
            bind(base)
            self.samples = self.samples or one_of_each_class(base)
            refuse(
                (m for r in self.samples if (m := r()) is not None),
                "set it to False, or call fastft.unpatch(model) to train with Liger's",
            )

    def __deepcopy__(self, memo) -> Watch:
        base = self.base()
        new = memo[id(self)] = Watch.__new__(Watch)
        new.base, new.samples = self.base if base is None else weakref.ref(copy.deepcopy(base, memo)), None
        return new

    def __reduce__(self):
        """A pickled model is a stock model: what comes back returns its arguments, and needs the standard library
        alone."""
        return getattr, ({}, "get")


def places(owner: dict, key: str, depth: int = 0) -> Iterator[tuple[types.FunctionType, Callable[[Callable], None]]]:
    """Every TRL forward reachable from a bound forward through the wrappers that belong to this instance, with a way to
    replace it."""
    value = owner.get(key)
    function = getattr(value, "__func__", value)

    def put(new: Callable) -> None:
        owner[key] = types.MethodType(new, value.__self__) if isinstance(value, types.MethodType) else new

    yield from _within(function, put, depth)


def _within(
    function, put: Callable[[Callable], None], depth: int
) -> Iterator[tuple[types.FunctionType, Callable[[Callable], None]]]:
    if depth > 6:
        return
    if isinstance(function, types.FunctionType):
        if NAME in function.__code__.co_names:
            yield function, put
            return
        for cell in function.__closure__ or ():
            try:
                inner = cell.cell_contents
            except ValueError:
                continue
            if isinstance(inner, types.MethodType):
                set_ = lambda new, cell=cell, inner=inner: setattr(
                    cell, "cell_contents", types.MethodType(new, inner.__self__)
                )
                yield from _within(inner.__func__, set_, depth + 1)
            elif callable(inner) and not isinstance(inner, (type, nn.Module)):
                yield from _within(inner, lambda new, cell=cell: setattr(cell, "cell_contents", new), depth + 1)
    elif hasattr(function, CALLED):  # Accelerate's cast of outputs to float32
        yield from _within(getattr(function, CALLED), lambda new, f=function: setattr(f, CALLED, new), depth + 1)


def bind(base: nn.Module) -> Proof | None:
    """Put this function in the place of TRL's, wherever it is bound on `base` now; the proof, or None where there is
    nothing."""
    if "forward" not in base.__dict__:
        return None
    proof = None
    for function, put in places(base.__dict__, "forward"):
        theirs = function.__globals__.get(NAME)
        if theirs is None or theirs is FusedHead:
            replaced = getattr(function, "_fastft_replaces", None)
            proof = proof if replaced is None else known_proof(KIND, *_question(base, replaced)) or proof
            continue
        key, device = _question(base, theirs)
        proof = proof_of(KIND, key, device, lambda theirs=theirs, key=key, device=device: _prove(theirs, key, device))
        if proof.ok:
            fast: Any = over_globals(function, {NAME: FusedHead})
            fast._fastft_original, fast._fastft_replaces = function, theirs
            put(fast)
    return proof


def _question(base: Any, theirs: type) -> tuple[tuple, torch.device]:
    """(what the proof of TRL's function depends on, where it runs): the function, the head's sizes up to where tiles
    repeat, dtypes."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    weight = getattr(getattr(head, "base_layer", head), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return (IdentityKey(theirs), (24, 97), torch.float32, False), torch.device("cpu")
    device = weight.device if weight.device.type != "meta" else torch.device("cpu")
    vocab, width = weight.shape
    return (
        IdentityKey(theirs),
        head_sizes(width, vocab, device),
        weight.dtype,
        getattr(head, "bias", None) is not None,
    ), device


def _prove(theirs: type, key: tuple, device: torch.device) -> Proof:
    _, (width, vocab), dtype, _ = key
    with undisturbed():
        return prove(theirs, FusedHead, width, vocab, dtype, device)


def standing(base: nn.Module) -> Proof | None:
    """The proof of what stands on `base` now, or None where TRL's forward does not; binds nothing, and proves
    nothing."""
    if "forward" not in base.__dict__:
        return None
    found = None
    for function, _ in places(base.__dict__, "forward"):
        theirs = function.__globals__.get(NAME)
        if theirs is FusedHead:
            replaced = function.__dict__.get("_fastft_replaces")
            found = found if replaced is None else known_proof(KIND, *_question(base, replaced)) or found
        elif theirs is not None:
            found = known_proof(KIND, *_question(base, theirs))
            if found is None or found.ok:
                found = Proof(
                    False, reason="TRL bound its forward since the patch: ours joins at the next forward or train()"
                )
    return found


def release(base: nn.Module) -> None:
    """Undo `bind` exactly."""
    for function, put in list(places(base.__dict__, "forward")):
        original = function.__dict__.get("_fastft_original")
        if original is not None:
            put(original)


def watch(model: nn.Module, base: nn.Module) -> None:
    """Let the modules through which a forward enters look for TRL's head."""
    for module in entrances(model, base):
        if not any(isinstance(h, Watch) for h in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(Watch(base))


def unwatch(model: nn.Module, base: nn.Module) -> None:
    """Undo `watch` exactly."""
    for root in (model, base):
        for module in root.modules():
            for key in [k for k, h in module._forward_pre_hooks.items() if isinstance(h, Watch)]:
                del module._forward_pre_hooks[key]
