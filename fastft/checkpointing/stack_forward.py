"""One training forward of a stack of layers under a policy."""

from __future__ import annotations

import functools
import threading
from collections.abc import Hashable

import torch
from torch import nn

from fastft.checkpointing.foreign_hooks import has_foreign_hooks
from fastft.checkpointing.layer_runs import CheckpointFunction, as_asked, checkpointed, is_plain
from fastft.checkpointing.layer_stack import Stack, graphs_of, kind_of
from fastft.checkpointing.memory_meter import Meter, keeping
from fastft.checkpointing.offload import Offloader
from fastft.checkpointing.policy_state import Controller
from fastft.checkpointing.split import Split, choose
from fastft.compat.torch_private import hooks_on_saved_tensors
from fastft.compat.transformers_private import FUNCTION, SWITCH

WORKSPACE = 2**29  # bytes for the head's tiles and other buffers that do not grow with the batch
HEAD_BYTES = 8  # for each value of the hidden states: the head's float32 row Jacobian and the gradient that it becomes


class Forward:
    """begin() before the layers run, end() after them; in between each layer calls its `Run`."""

    def __init__(self, controller: Controller, stack: Stack):
        self.controller, self.stack = controller, stack
        self.mode, self.why = controller.mode, ""
        self.ran = False
        self.thread: int | None = threading.get_ident()
        self.split: Split | None = None
        self.offloader: Offloader | None = None
        self.before: list[tuple[nn.Module, dict]] = []  # what stood in a layer's __dict__
        self.layers: list[nn.Module] = []  # those that the policy is about, in order
        self.kinds: list[Hashable] = []  # theirs, for "auto"
        self.counts = {"kept": 0, "recomputed": 0, "offloaded": 0}

    def begin(self) -> None:
        first = self.controller.policy.layers or 0
        if self.mode == "auto" and saved_tensors_are_hooked():
            # somebody moves what is saved already (TRL's activation offloading)
            self.mode, self.why = "trainer", " (as the trainer says: saved tensors are hooked)"
        everything = self.controller.is_explicit and self.mode != "none"
        for layer in self.stack.alive():
            theirs = asked_for(layer)
            if theirs is None and not everything:
                continue
            index = len(self.layers)
            self.layers.append(layer)
            if theirs is None and self.mode == "layers" and index >= first:
                continue
            self.before.append((layer, {n: layer.__dict__[n] for n in (SWITCH, FUNCTION) if n in layer.__dict__}))
            layer.__dict__.update({SWITCH: True, FUNCTION: Run(self, index, theirs)})

    def over(self) -> None:
        """End this forward: a layer that is called from now on is not called under its policy."""
        self.thread = None

    def end(self) -> None:
        self.over()
        for layer, was in self.before:
            layer.__dict__.update(was)
            for name in (SWITCH, FUNCTION):
                if name not in was:
                    layer.__dict__.pop(name, None)
        self.before.clear()
        if not self.ran:  # compiled, or run by a guarded step's own
            return
        self.counts["kept"] += len(self.layers) - sum(self.counts.values())
        said = ", ".join(f"{n} {what}" for what, n in self.counts.items() if n)
        self.stack.last = f"{said} layers{self.why}" if said else ""

    def run(self, index: int, theirs: CheckpointFunction | None, function, args: tuple):
        if self.thread != threading.get_ident():  # another thread's forward of the same layers
            return function(*args) if theirs is None else as_asked(theirs, function, *args)
        self.ran, x = True, args[0] if args else None
        if not isinstance(x, torch.Tensor) or x.dim() < 2:
            return function(*args) if theirs is None else as_asked(theirs, function, *args)
        if self.split is None:
            self.split = self._decide(x)
        if self.split is None:
            return self._measured(index, function, args)
        if index >= self.split.recomputed:
            return self._measured(index, function, args) if self._is_longer(index, x) else function(*args)
        if theirs is not None and (self.mode == "full" or not is_plain(theirs)):  # reentrant, selective, somebody's own
            self.counts["recomputed"] += 1
            return as_asked(theirs, function, *args)
        offloader = None
        if index < self.split.offloaded:
            offloader = self.offloader = self.offloader or Offloader(x.device)
        self.counts["recomputed" if offloader is None else "offloaded"] += 1
        embedded = self.controller.embedded if index == 0 and not has_foreign_hooks(self.layers[0]) else None
        in_full, graphs = self.mode == "full", graphs_of(self.layers[index]) if offloader is None else None
        run = functools.partial(checkpointed, args=args, embedded=embedded, offloader=offloader, again_in_full=in_full)
        return run(function) if graphs is None else graphs.recomputed(function, args, run, in_full)

    def _decide(self, x: torch.Tensor) -> Split | None:
        """The split of a forward whose first layer is given x [..., tokens, hidden]; None while a kind of layer is not
        measured."""
        n, policy = len(self.layers), self.controller.policy
        if self.mode != "auto":
            return {"none": Split(0), "offload": Split(n, n), "layers": Split(min(policy.layers or 0, n))}.get(
                self.mode, Split(n)
            )
        graphs = graphs_of(self.layers[0])
        if graphs is not None and (captured := graphs.stack.split(x)) is not None:
            return captured
        tokens, length, kept = x.numel() // x.shape[-1], x.shape[-2], []
        self.kinds = self.kinds or [kind_of(layer) for layer in self.layers]
        for kind in self.kinds:
            found = self.stack.measured.get(kind)
            if found is None:
                return None
            per_token, seen = found
            kept.append(int(per_token * tokens * max(1.0, length / seen)))  # attention may keep the square of a length
        meter = self.controller.meter or Meter(x.device, policy.budget)
        available = meter.available()
        if available is None:
            self.mode, self.why = (
                "trainer",
                f" (as the trainer says: the free memory of a {x.device.type} device is not known)",
            )
            return Split(n)
        reserve = WORKSPACE + HEAD_BYTES * x.numel() + max(kept, default=0) + self.controller.missing()
        split = choose(kept, [x.numel() * x.element_size()] * n, int(available * self.stack.share), reserve)
        if graphs is not None:
            graphs.stack.remember(x, split)
        return split

    def _is_longer(self, index: int, x: torch.Tensor) -> bool:
        """Is x longer than the rows on which this kind of layer was measured? Not where the split is one that was
        decided for this very shape: then no kinds were asked for."""
        found = self.stack.measured.get(self.kinds[index]) if self.mode == "auto" and self.kinds else None
        return found is not None and x.shape[-2] > found[1]

    def _measured(self, index: int, function, args: tuple):
        x = args[0]
        with keeping(self.layers[index].parameters()) as kept:
            out = function(*args)
        self.stack.measured[self.kinds[index]] = kept.bytes / (x.numel() // x.shape[-1]), x.shape[-2]
        return out


class Run:
    """What stands in the place of a layer's checkpoint function during one forward. theirs: what stood there, if it was
    switched on."""

    def __init__(self, forward: Forward, index: int, theirs: CheckpointFunction | None):
        self.forward, self.index, self.theirs = forward, index, theirs

    def __call__(self, function, *args, **kwargs):
        if kwargs:  # transformers binds a layer's keyword arguments before it checkpoints
            raise TypeError(f"a checkpointed layer: want positional arguments alone, got {sorted(kwargs)}")
        return self.forward.run(self.index, self.theirs, function, args)


def asked_for(layer: nn.Module) -> CheckpointFunction | None:
    """The checkpoint function that the trainer gave this layer, if it switched it on."""
    found = layer.__dict__.get(FUNCTION) if layer.gradient_checkpointing else None
    return found.theirs if isinstance(found, Run) else found


def saved_tensors_are_hooked() -> bool:
    """Does somebody see what autograd saves now?"""
    return hooks_on_saved_tensors(True) is not None
