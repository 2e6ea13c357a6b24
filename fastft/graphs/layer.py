"""One layer's calls: eager at first, captured when the same call has come twice, replayed from then on."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastft.checkpointing.layer_stack import GRAPHS
from fastft.compat.transformers_private import is_collecting_hook
from fastft.graphs.arguments import Arguments, Unsupported, flatten
from fastft.graphs.buffers import is_dense
from fastft.graphs.captured import FULL, KEPT, LEAN, Call, Captured
from fastft.graphs.proof import prove
from fastft.graphs.signature import LayerState, environment, obstacle_in
from fastft.graphs.stack import MOST, OUT_OF_ORDER, REPEATS, StackGraphs
from fastft.swapping.swap import KEY, Replacement, order, slot_of

SEEN_MOST = 8  # sorts of calls that are remembered, captured or not
PATIENCE = 64  # new sorts in a row, without a replay, after which only every 64th call is looked at


@dataclass(eq=False)
class Signature:
    """One sort of call of one layer: its arguments' key, torch's settings, what the forward keeps, the layer's state.
    refused: why it is not captured."""

    key: Hashable
    state: LayerState
    input: Hashable
    times: int = 0
    refused: str = ""
    captured: Captured | None = None
    sequence: int = 0


class LayerGraphs:
    """What the swap keeps on a layer: the calls that it has seen, the latest last."""

    def __init__(self, stack: StackGraphs, index: int):
        self.stack, self.index = stack, index
        self.seen: list[Signature] = []
        self.calls, self.new = 0, 0  # new: sorts of calls since the last replay

    def call(self, layer: nn.Module, args: tuple, kwargs: dict, policy: str, eager: Callable[[], Any]) -> Any:
        """The layer's output for these arguments. eager: runs it as it would run without graphs."""
        stack = self.stack
        if not stack.lock.acquire(blocking=False):
            return eager()  # another thread is capturing or replaying
        try:
            stack.enter(self.index)
            why, call = self._replayable(layer, args, kwargs, policy)
            if call is not None:
                return self._replay(*call)
            stack.eager[why] += 1
        finally:
            stack.lock.release()
        return eager()

    def _replayable(
        self, layer: nn.Module, args: tuple, kwargs: dict, policy: str
    ) -> tuple[str, tuple[Signature, Arguments] | None]:
        """(why not; the signature and arguments of a call that is loaded into its capture's buffers)."""
        x = args[0] if args else None
        if not isinstance(x, torch.Tensor):
            return "a layer's first argument is no tensor", None
        if not layer.training:
            return "a layer is in eval mode", None
        if why := self.stack.obstacle(x.device):
            return why, None
        self.calls += 1
        if self.new >= PATIENCE and self.calls % PATIENCE:
            return "calls that differ from one to the next (lengths of rows, a layer's attributes)", None
        try:
            given = flatten((args, kwargs))
        except Unsupported as e:
            return str(e), None
        if type(x) is not torch.Tensor or not all(is_dense(t) for t in given.tensors if t is x or t.requires_grad):
            return "a layer's input has gaps or repeats in memory", None
        found = self._find(layer, x, given, policy)
        if found.refused:
            return found.refused, None
        if found.captured is None:
            found.times += 1
            if found.times <= REPEATS:
                return "a call that has not come often enough to be captured", None
            if why := self.stack.conflict(self.index, None):
                return why, None
            if self.stack.recorder.is_short(x.device):
                return "too little memory is free on the device to hold activations between steps", None
            self._capture(layer, found, given, policy)
            if found.refused:
                return found.refused, None
        why = self._load(found, given)
        return why, None if why else (found, given)

    def _find(self, layer: nn.Module, x: torch.Tensor, given: Arguments, policy: str) -> Signature:
        key, state = (given.key, environment(x.device.type), policy), self._state(layer)
        for i in reversed(range(len(self.seen))):
            if self.seen[i].state is state and self.seen[i].key == key:
                self.seen.append(found := self.seen.pop(i))
                return found
        found = Signature(key, state, (x.shape, x.dtype), refused=obstacle_in(layer, x.device, is_collecting_hook))
        self.seen.append(found)
        self.new += 1
        self._forget()
        return found

    def _state(self, layer: nn.Module) -> LayerState:
        """The layer as it stands: one of those that were seen, or new."""
        tried: list[LayerState] = []
        for signature in reversed(self.seen):
            if not any(signature.state is s for s in tried):
                if signature.state.matches(layer):
                    return signature.state
                tried.append(signature.state)
        return LayerState(layer)

    def _forget(self) -> None:
        """The least recently used go, but for those whose backward may still come."""
        for signature in list(self.seen):
            captured = [s for s in self.seen if s.captured is not None]
            if len(self.seen) <= SEEN_MOST and len(captured) <= MOST:
                return
            if len(self.seen) > SEEN_MOST or signature.captured is not None:
                self._drop(signature)

    def _drop(self, signature: Signature) -> bool:
        if signature.captured is not None:
            if any(c.captured is signature.captured and c.token() is not None for c in self.stack.waiting):
                return False
            self.stack.captures[signature.input] -= 1
        self.seen.remove(signature)
        return True

    def _capture(self, layer: nn.Module, signature: Signature, given: Arguments, policy: str) -> None:
        stack = self.stack
        counters = [(s.fallbacks, dict(s.fallbacks)) for m in layer.modules() if (s := slot_of(m)) is not None]
        try:
            # the layer's input is its own; what else needs no gradient may be other layers' as well
            shared = [
                stack.shared.for_capture(t, stack.turn) if i and not t.requires_grad else None
                for i, t in enumerate(given.tensors)
            ]
            captured = Captured(layer, below, given, policy, stack.recorder, stack.scratch, shared, signature.state)
            findings = prove(captured, layer, given.tensors, stack.turn)
        except Exception as e:  # whatever it is: the eager path is there
            signature.refused = f"capturing failed: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
            return
        finally:
            for counter, was in counters:
                counter.clear()
                counter.update(was)
        signature.refused = findings.reason
        if not findings.ok:
            return
        for name in findings.loose:
            stack.notes[f"{name} does not repeat itself in eager runs: within twice that in the replay"] += 1
        stack.sequence += 1
        stack.captures[signature.input] += 1
        signature.captured, signature.sequence = captured, stack.sequence
        self._forget()

    def _load(self, signature: Signature, given: Arguments) -> str:
        """Empty, or why the call's tensors are not loaded."""
        stack, captured = self.stack, signature.captured
        assert captured is not None
        if why := stack.conflict(self.index, signature.sequence):
            if why == OUT_OF_ORDER and self._drop(signature):  # captured anew when it comes again
                signature.captured, signature.times = None, REPEATS
                self.seen.append(signature)
            return why
        held: dict[int, torch.Tensor] = {}
        for buffer, t in zip(captured.shared, given.tensors):
            if buffer is not None and not (held.setdefault(id(buffer), t) is t and buffer.can_take(t, stack.turn)):
                return "layers that shared an argument when they were captured are given different ones"
        captured.load(given.tensors, stack.turn)
        return ""

    def _replay(self, signature: Signature, given: Arguments) -> Any:
        """The output of a call that is loaded."""
        stack, captured = self.stack, signature.captured
        assert captured is not None
        call = Call(captured, self.index, signature.sequence, stack.backward)
        output = call.apply(given.tensors)
        stack.replays += 1
        self.new = 0
        stack.waiting.append(call)
        for buffer in captured.shared:
            if buffer is not None:
                buffer.users.append(call.token)
        return output

    def recomputed(self, function: Any, args: tuple, run: Callable[[Callable], Any], in_full: bool) -> Any:
        """A call that the activation policy runs as run(function): recomputed in the backward. function: the layer's
        forward with its keyword arguments bound, as transformers makes it."""
        if not isinstance(function, functools.partial):
            return run(function)
        # the forward of a class and its instance, or (transformers before 5.20) the instance's own __call__
        called = not function.args
        layer: Any = getattr(function.func, "__self__", None) if called else function.args[0]
        if len(function.args) > 1 or not isinstance(layer, nn.Module) or not _is_owner(layer, self):
            return run(function)
        kwargs = function.keywords
        plain = WithoutGraphs(function) if called else functools.partial(below(layer), **kwargs)
        return self.call(layer, args, kwargs, FULL if in_full else LEAN, lambda: run(plain))

    def dissolve(self) -> None:
        """Let go of everything: the swap is off."""
        self.seen.clear()
        self.stack.captures.clear()

    def __deepcopy__(self, memo) -> LayerGraphs:
        new = memo[id(self)] = LayerGraphs(copy.deepcopy(self.stack, memo), self.index)
        return new


def _is_owner(layer: nn.Module, graphs: LayerGraphs) -> bool:
    slot = slot_of(layer)
    return slot is not None and slot.owner() is layer and GRAPHS in slot.parts and slot.state(GRAPHS) is graphs


class _Inside(threading.local):
    depth = 0


_INSIDE = _Inside()  # of how many `WithoutGraphs` this thread is inside


class WithoutGraphs:
    """A layer's `__call__` that its mixin lets pass, in a recomputation too: the graphs have been asked before."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args):
        _INSIDE.depth += 1
        try:
            return self.function(*args)
        finally:
            _INSIDE.depth -= 1


@order(-20)
class GraphedLayer(Replacement):
    """Mixin of a layer, outermost of all."""

    def forward(self, *args, **kwargs):
        slot = self.__dict__.get(KEY)
        # (a replica's owner is another)
        if slot is None or _INSIDE.depth or torch.compiler.is_compiling() or slot.owner() is not self:
            return super().forward(*args, **kwargs)
        graphs: LayerGraphs = slot.state(GRAPHS)
        forward = super().forward
        return graphs.call(self, args, kwargs, KEPT, lambda: forward(*args, **kwargs))


def below(layer: nn.Module) -> Callable:
    """The layer's forward under this mixin."""
    behind: Any = super(GraphedLayer, layer)  # type: ignore[misc]
    return behind.forward
