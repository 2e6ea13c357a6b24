"""TRL's fused LM head on fastft's function, for one model.

TRL's trainers bind a forward on the model's instance that multiplies the head's weight itself, in tiles, through a private autograd function
which it finds by a global name. Here a copy of that bound forward, over other globals in which the name means `linear_logprob`, takes its place
on this instance (two products instead of three for a frozen head). TRL's modules stay as they are. Before it does, both are run on small random
cases; where the signature or the numbers differ, TRL's own path stays, and the report says which one runs.

TRL may bind its forward after the patch, and Accelerate may wrap it again: so the model, its backbone and PEFT's wrappers watch for it
with a forward pre-hook, which costs one dictionary look-up. Under PEFT that is before the first step; a bare model takes its first
step through TRL's function and the rest through this one.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn

from fastft.patching.oom import not_for_want_of_memory
from fastft.patching.prove import Proof
from fastft.patching.rebind import over_globals
from fastft.patching.relief import with_room
from fastft.patching.truth import float64_truth
from fastft.swaps.liger import one_of_each_class, refuse
from fastft_kernels.linear_logprob import linear_logprob
from fastft_kernels.numerics import compare

KIND = "fused head"
NAME = "_ChunkedLogProbFunction"
KERNEL = "linear_logprob"
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_PROOFS: dict[type, Proof] = {}


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
    """The forward pre-hook: rebinds when TRL's forward is there, refuses Liger's. A copy of the model watches the copy."""

    def __init__(self, base: nn.Module):
        self.base, self.samples = weakref.ref(base), None

    def __call__(self, module: nn.Module, args) -> None:
        if not torch.compiler.is_compiling() and (base := self.base()) is not None:
            bind(base)
            self.samples = self.samples or one_of_each_class(base)
            refuse((m for r in self.samples if (m := r()) is not None), "set it to False, or call fastft.unpatch(model) to train with Liger's")

    def __deepcopy__(self, memo) -> Watch:
        base = self.base()
        new = memo[id(self)] = Watch.__new__(Watch)
        new.base, new.samples = self.base if base is None else weakref.ref(copy.deepcopy(base, memo)), None
        return new

    def __reduce__(self):
        """A pickled model is a stock model: what comes back returns its arguments, and needs the standard library alone."""
        return getattr, ({}, "get")


def places(owner: dict, key: str, depth: int = 0) -> Iterator[tuple[types.FunctionType, Callable[[Callable], None]]]:
    """Every TRL forward reachable from a bound forward through the wrappers that belong to this instance, with a way to replace it."""
    value = owner.get(key)
    function = getattr(value, "__func__", value)

    def put(new: Callable) -> None:
        owner[key] = types.MethodType(new, value.__self__) if isinstance(value, types.MethodType) else new

    yield from _within(function, put, depth)


def _within(function, put: Callable[[Callable], None], depth: int) -> Iterator[tuple[types.FunctionType, Callable[[Callable], None]]]:
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
                set_ = lambda new, cell=cell, inner=inner: setattr(cell, "cell_contents", types.MethodType(new, inner.__self__))
                yield from _within(inner.__func__, set_, depth + 1)
            elif callable(inner) and not isinstance(inner, (type, nn.Module)):
                yield from _within(inner, lambda new, cell=cell: setattr(cell, "cell_contents", new), depth + 1)
    elif hasattr(function, "model_forward"):  # Accelerate's cast of outputs to float32
        yield from _within(function.model_forward, lambda new, f=function: setattr(f, "model_forward", new), depth + 1)


def bind(base: nn.Module) -> Proof | None:
    """Put this function in the place of TRL's, wherever it is bound on `base` now; the proof, or None where there is nothing."""
    if "forward" not in base.__dict__:
        return None
    proof = None
    for function, put in places(base.__dict__, "forward"):
        theirs = function.__globals__.get(NAME)
        if theirs is None or theirs is FusedHead:
            proof = _PROOFS.get(getattr(function, "_fastft_replaces", None), proof)
            continue
        if theirs not in _PROOFS:
            with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                _PROOFS[theirs] = prove(theirs)
        proof = _PROOFS[theirs]
        if proof.ok:
            fast = over_globals(function, {NAME: FusedHead})
            fast._fastft_original, fast._fastft_replaces = function, theirs
            put(fast)
    return proof


def release(base: nn.Module) -> None:
    """The exact undo of `bind`."""
    for function, put in list(places(base.__dict__, "forward")):
        original = function.__dict__.get("_fastft_original")
        if original is not None:
            put(original)


def watch(model: nn.Module, base: nn.Module) -> None:
    """Let the modules through which a forward enters look for TRL's head."""
    for module in _entrances(model, base):
        if not any(isinstance(h, Watch) for h in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(Watch(base))


def unwatch(model: nn.Module, base: nn.Module) -> None:
    for root in (model, base):
        for module in root.modules():
            for key in [k for k, h in module._forward_pre_hooks.items() if isinstance(h, Watch)]:
                del module._forward_pre_hooks[key]


def _entrances(model: nn.Module, base: nn.Module) -> list[nn.Module]:
    tuner = getattr(model, "base_model", None) if hasattr(model, "peft_config") else None
    backbone = getattr(base, "base_model", None)
    return [m for m in dict.fromkeys((model, tuner, base, backbone)) if isinstance(m, nn.Module)]


def prove(theirs: type) -> Proof:
    """TRL's function and this one on the same random cases: results and gradients, with and without soft-cap, bias, entropy."""
    worst = None
    for case, (softcap, scale, temperature, outputs) in enumerate(((None, 1.0, 1.0, ()), (None, 0.5, 0.7, OUTPUTS), (5.0, 1.0, 1.3, OUTPUTS))):
        g = torch.Generator().manual_seed(case)
        h, w, b = (torch.randn(s, generator=g) for s in ((11, 24), (97, 24), (97,)))
        t = torch.randint(0, 97, (11,), generator=g)
        up = torch.randn(11, generator=g)

        def run(function, dtype, case=case, h=h, w=w, b=b, t=t, up=up, settings=(temperature, 32, softcap, scale, outputs)):
            x = h.to(dtype).requires_grad_()
            bias = b.to(dtype) if case else None
            out = function.apply(x, w.to(dtype), bias, t, *settings)
            grad = torch.autograd.grad((out[0] * up.to(dtype)).sum(), x)[0]
            return [*(o.detach() for o in out[:4] if o is not None), grad], [o is None for o in out], out[4]

        try:
            with float64_truth():
                truth, *_ = run(theirs, torch.float64)
            eager, gone, top = run(theirs, torch.float32)
            ours, our_gone, our_top = run(FusedHead, torch.float32)
        except Exception as e:
            not_for_want_of_memory(e)
            return Proof(False, dtype="float32", reason=f"the two functions cannot be run on the same arguments: {type(e).__name__}: {e}")
        if gone != our_gone or (top is not None and not torch.equal(top, our_top)):
            return Proof(False, dtype="float32", reason="the two functions return different fields")
        verdict = compare(ours, [x.double() for x in truth], eager)
        if not verdict:
            return Proof(False, verdict.error, verdict.eager_error, "float32", str(verdict))
        if worst is None or verdict.error > worst.error:
            worst = Proof(True, verdict.error, verdict.eager_error, "float32")
    return worst
