"""What the graphs of one stack of layers share: one memory pool, the calls that wait for their backward, the report.

In one pool, what a later capture keeps for its backward may lie where an earlier capture worked (and has finished). So
a graph may be replayed only while no later capture waits for its backward; and a layer is replayed only while all that
wait belong to layers before it. One training forward, its layers in order, and its backward meet both; a second forward
meanwhile (DPO, two losses) does not, and runs eagerly. Those that wait are then always in the order of their captures,
and the last of them decides."""

from __future__ import annotations

import copy
import threading
import weakref
from collections import Counter
from collections.abc import Hashable

import torch
from torch import nn

from fastft.checkpointing.controller import RetryingForward
from fastft.checkpointing.split import Split
from fastft.checkpointing.stack_forward import saved_tensors_are_hooked
from fastft.compat.torch_private import current_backward, function_modes
from fastft.compat.transformers_private import is_collecting_outputs
from fastft.graphs.buffers import Scratch, SharedBuffers
from fastft.graphs.captured import Call, Found
from fastft.graphs.recorder import Recorder
from fastft.swapping.stock_only import transformed
from fastft_kernels.runtime.compat import dispatch_modes

MOST = 4  # captures of one layer
REPEATS = 2  # times that a call has come before it is captured


class StackGraphs:
    """One for each stack. owner: the module that calls the layers. turn: the number of the forward, as the layers'
    order shows it."""

    def __init__(self, owner: weakref.ref[nn.Module], recorder: Recorder, asked: bool = False):
        self.owner, self.recorder, self.asked = owner, recorder, asked
        self.lock = threading.RLock()
        self.waiting: list[Call] = []
        self.scratch, self.shared = Scratch(), SharedBuffers()
        self.sequence, self.turn, self.last = 0, 0, -1
        self.place: Hashable = None
        self.splits: dict[Hashable, Split] = {}
        self.captures: Counter[Hashable] = Counter()  # by the layer's input
        self.replays, self.seen = 0, 0
        self.eager: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def enter(self, index: int) -> None:
        """Note that layer `index` is called; a new forward begins where the order starts again."""
        self.seen += 1
        if index <= self.last:
            self.turn += 1
        self.last = index

    def _latest(self) -> Call | None:
        while self.waiting and self.waiting[-1].token() is None:
            self.waiting.pop()
        return self.waiting[-1] if self.waiting else None

    def conflict(self, index: int, sequence: int | None) -> str:
        """Why a graph of layer `index` may not be replayed (sequence None: captured) now; empty where it may."""
        latest = self._latest()
        if latest is None:
            return ""
        if latest.index >= index:
            return "another forward waits for its backward"
        if sequence is not None and latest.sequence > sequence:
            return OUT_OF_ORDER
        return ""

    def is_latest(self, call: Call) -> bool:
        return self._latest() is call

    def obstacle(self, device: torch.device) -> str:
        """Why no layer of this stack is captured or replayed in a call like this one; empty where it may be."""
        if not torch.is_grad_enabled():
            return "no gradients are asked for"
        if transformed() or torch.is_inference_mode_enabled():
            return "under a torch.func transform, a tracer or inference mode"
        if current_backward() != -1:
            return "inside a backward"
        if saved_tensors_are_hooked():
            return "saved tensors are hooked (a checkpoint, activation offloading)"
        if dispatch_modes() or function_modes():
            return "a torch mode listens to every operation"
        if torch.is_anomaly_enabled():
            return "anomaly detection is on"
        if is_collecting_outputs():
            return "hidden states, attentions or router logits are asked for"
        owner = self.owner()
        if owner is not None and isinstance(owner.__dict__.get("forward"), RetryingForward):
            return "the first step, which can be run again when memory runs out"
        if why := self.recorder.obstacle(device):
            return why
        place = self.recorder.place(device)
        if self.place is None:
            self.place = place
        return "" if self.place == place else "on another device or stream than before"

    def backward(self, call: Call, upstream: tuple, stubs: tuple, create_graph: bool) -> Found:
        """The gradients of a replayed call: by the captured backward, or by running the layer again where that one does
        not fit."""
        with self.lock:
            if create_graph:
                why = "a backward that is itself to be differentiated"
            elif not call.captured.fits(upstream):
                why = "a backward whose gradients are laid out otherwise, or not all there"
            elif not self.is_latest(call):
                why = "a backward out of order, or of a graph that is retained"
            else:
                return call.captured.backward(upstream)
            self.eager[why] += 1
            return call.captured.again(upstream, stubs, create_graph)

    # the activation policy "auto" measures free memory, of which captures hold a part: what they were made with stays

    def split(self, x: torch.Tensor) -> Split | None:
        """The split under which the layers were captured for inputs like x; None where none is."""
        key = (x.shape, x.dtype)
        return self.splits.get(key) if self.captures[key] else None

    def remember(self, x: torch.Tensor, split: Split) -> None:
        """Note the split that was decided for inputs like x."""
        self.splits[x.shape, x.dtype] = split

    def lines(self, layers: int) -> list[str]:
        """Lines for the report: how many calls were replayed, and why others ran eagerly."""
        owner = self.owner()
        name = "a model" if owner is None else type(owner).__name__
        held = sum(self.captures.values())
        if not self.seen and not self.asked:
            return []
        lines = [f"CUDA graphs: {name}, {layers} layers: {held} captured, {self.replays} of {self.seen} calls replayed"]
        lines += [f"CUDA graphs: {n} calls ran eagerly: {why}" for why, n in self.eager.items()]
        lines += [f"CUDA graphs: {n} x {note}" for note, n in self.notes.items()]
        return lines

    def __deepcopy__(self, memo) -> StackGraphs:
        owner = self.owner()
        new = memo[id(self)] = StackGraphs(self.owner, self.recorder.fresh(), self.asked)
        if owner is not None:
            new.owner = weakref.ref(copy.deepcopy(owner, memo))
        return new


OUT_OF_ORDER = "captured in another order than the layers are called"
