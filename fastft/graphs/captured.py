"""One layer's forward and backward, captured, and the autograd function that replays them.

    forward    x, other tensors -> static buffers;  replay;  static outputs -> new tensors
    backward   gradients of the outputs -> static buffers;  replay;  static gradients -> new tensors

What leaves is always a copy. The captured backward differentiates with respect to aliases of the parameters, leaves of
their own over the same memory, so that no accumulation node of a parameter is made where captures are; the function
hands the gradients to autograd, which accumulates them as ever, hooks included. Recomputation lies inside the backward.

Where a replay cannot give a backward (it is itself to be differentiated, it comes out of order, a gradient is laid out
otherwise) the layer is run again from its static inputs, eagerly, to the same bits."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastft.checkpointing.layer_runs import checkpointed
from fastft.graphs.arguments import Arguments, flatten, rebuild
from fastft.graphs.buffers import Scratch, SharedBuffer, copy_into, static_like
from fastft.graphs.recorder import Recorder
from fastft.graphs.signature import LayerState
from fastft_kernels.runtime.compat import copy_each

# a layer's activation policy: everything is kept; only its input is, and the recomputation leaves out products whose
# results no gradient needs; or only its input is, and all of it is recomputed (fastft/checkpointing/policy.py)
KEPT, LEAN, FULL = "kept", "lean", "full"
Tensors = list[torch.Tensor]
Found = list[torch.Tensor | None]


class LayerForward:
    """A layer's forward below this package's mixin. It knows the layer weakly: the autograd graph of a capture keeps
    this."""

    def __init__(self, layer: nn.Module, below: Callable[[nn.Module], Callable], kwargs: dict):
        self.layer, self.below, self.kwargs = weakref.ref(layer), below, kwargs

    def __call__(self, *args):
        layer = self.layer()
        assert layer is not None
        return self.below(layer)(*args, **self.kwargs)


def autocast_of_now(kind: str) -> Callable[[bool], contextlib.AbstractContextManager]:
    """Makes the autocast that is in force now (True), or none (False), for another time; without its cache of cast
    weights, which would outlive a capture."""
    settings = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in sorted({"cpu", kind})]

    def context(on: bool) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for k, enabled, dtype in settings:
            stack.enter_context(torch.autocast(k, dtype=dtype, enabled=enabled and on, cache_enabled=False))
        return stack

    return context


class Captured:
    """A capture for one signature of one layer.

    below: gives the layer's forward that is captured. policy: KEPT, LEAN or FULL. shared: for each tensor argument the
    buffer that it has together with other layers, or None. state: the layer's, now. Raises Unsupported for arguments or
    results that have no static counterpart."""

    def __init__(
        self,
        layer: nn.Module,
        below: Callable[[nn.Module], Callable],
        given: Arguments,
        policy: str,
        recorder: Recorder,
        scratch: Scratch,
        shared: Sequence[SharedBuffer | None],
        state: LayerState,
    ):
        self.layer, self.below, self.policy = weakref.ref(layer), below, policy
        self.template, self.recorder, self.scratch, self.shared = given.template, recorder, scratch, list(shared)
        self.statics = [static_like(t) if b is None else b.static for t, b in zip(given.tensors, shared)]
        self.differentiable = [i for i, t in enumerate(given.tensors) if t.requires_grad]
        self.state = state
        places: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
        for module in layer.modules():
            for name, p in module._parameters.items():
                if p is not None and p.requires_grad:
                    places.setdefault(id(p), (p, []))[1].append((module, name))
        # of the layer itself by None: it is not to be held
        self.parameters = [(p, [(None if m is layer else m, n) for m, n in where]) for p, where in places.values()]
        names = {id(p): n for n, p in layer.named_parameters(remove_duplicate=False)}
        self.names = [f"the gradient of input {i}" for i in self.differentiable]
        self.names += [f"the gradient of {names[id(p)]}" for p, _ in self.parameters]
        self.autocast = autocast_of_now(given.tensors[0].device.type)
        self.device = given.tensors[0].device
        self.output: Any = None  # the output's template
        self.learns: list[bool] = []  # of the output's tensors, which have a gradient
        self.outputs: Tensors = []
        self.upstream: Tensors = []
        self.used: list[bool] = []  # of inputs and parameters, which have a gradient
        self.gradients: Tensors = []
        self._edges: list = []
        self._sources: Tensors = []
        self.forward_replay: Callable[[], None] | None = None
        self.backward_replay: Callable[[], None] | None = None

    # what is captured

    @contextlib.contextmanager
    def _aliased(self) -> Iterator[Tensors]:
        layer = self.layer()
        assert layer is not None
        aliases: Tensors = [nn.Parameter(p.detach()) for p, _ in self.parameters]
        for alias, (_, places) in zip(aliases, self.parameters):
            for module, name in places:
                (module or layer)._parameters[name] = alias  # type: ignore[assignment]
        try:
            yield aliases
        finally:
            for p, places in self.parameters:
                for module, name in places:
                    (module or layer)._parameters[name] = p

    def _call(self, tensors: Sequence[torch.Tensor], policy: str) -> Arguments:
        args, kwargs = rebuild(self.template, list(tensors))
        layer = self.layer()
        assert layer is not None
        function = LayerForward(layer, self.below, kwargs)
        if policy == KEPT:
            return flatten(function(*args))
        # nothing random is drawn in what is captured, so that there is no state to preserve
        return flatten(checkpointed(function, args, again_in_full=policy == FULL, preserve_rng_state=False))

    def _leaves(self, tensors: Sequence[torch.Tensor]) -> Tensors:
        return [t.detach().requires_grad_() if i in self.differentiable else t.detach() for i, t in enumerate(tensors)]

    def eager(self, tensors: Sequence[torch.Tensor], upstream: Callable[[Tensors], Tensors]) -> tuple[Tensors, Found]:
        """One forward and backward of the layer on `tensors`: its output's tensors, and the gradients of inputs and
        parameters. upstream: makes the gradients of the outputs that have one. `.grad` is not touched."""
        with torch.enable_grad(), self._aliased() as aliases:
            inputs = self._leaves(tensors)
            with self.autocast(True):
                out = self._call(inputs, self.policy)
            ys = [t for t in out.tensors if t.requires_grad]
            sources = [inputs[i] for i in self.differentiable] + aliases
            found: Found = []
            if ys:
                with self.autocast(False):
                    found += torch.autograd.grad(ys, sources, upstream(ys), allow_unused=True)
        self.output, self.learns = out.template, [t.requires_grad for t in out.tensors]
        return [t.detach() for t in out.tensors], found

    def prepare(self, outputs: Tensors, found: Found) -> None:
        """Make static counterparts of the outputs and gradients of an eager run."""
        self.outputs = [self.scratch.like(("output", i), t) for i, t in enumerate(outputs)]
        learning = [t for t, learns in zip(outputs, self.learns) if learns]
        self.upstream = [self.scratch.like(("upstream", i), t) for i, t in enumerate(learning)]
        self.used = [g is not None for g in found]
        self.gradients = [self.scratch.like(("gradient", i), g) for i, g in enumerate(found) if g is not None]

    def _run_forward(self) -> None:
        with torch.enable_grad(), self._aliased() as aliases:
            inputs = self._leaves(self.statics)
            with self.autocast(True):
                out = self._call(inputs, self.policy)
            # edges keep what was saved for the backward, and not the outputs
            self._edges = [torch.autograd.graph.get_gradient_edge(t) for t in out.tensors if t.requires_grad]
            self._sources = [inputs[i] for i in self.differentiable] + aliases
        for static, t in zip(self.outputs, out.tensors):
            static.copy_(t.detach())

    def _run_backward(self) -> None:
        with self.autocast(False):
            # retained: what was saved keeps its addresses as long as this capture lives
            found = torch.autograd.grad(self._edges, self._sources, self.upstream, retain_graph=True, allow_unused=True)
        there = [g for g in found if g is not None]
        if there:
            copy_each(self.gradients, there)

    def capture(self) -> None:
        """Capture the forward and the backward with the recorder."""
        self.forward_replay = self.recorder.capture(self._run_forward)
        self.backward_replay = self.recorder.capture(self._run_backward)

    # what replays

    def load(self, tensors: Sequence[torch.Tensor], turn: int) -> None:
        """Copy a call's tensors into the static ones."""
        for static, buffer, t in zip(self.statics, self.shared, tensors):
            if buffer is None:
                copy_into(static, t)
            else:
                buffer.fill(t, turn)

    def forward(self) -> Tensors:
        """The outputs for what was loaded."""
        assert self.forward_replay is not None
        self.forward_replay()
        return [t.clone() for t in self.outputs]

    def backward(self, upstream: Sequence[torch.Tensor]) -> Found:
        """The gradients of inputs and parameters under `upstream`, one for each output that has a gradient."""
        assert self.backward_replay is not None
        for static, g in zip(self.upstream, upstream):
            static.copy_(g)
        self.backward_replay()
        found = iter([t.clone() for t in self.gradients])
        return [next(found) if used else None for used in self.used]

    def fits(self, upstream: Sequence[torch.Tensor | None]) -> bool:
        """Can the captured backward take these gradients as they are?"""
        return all(
            type(g) is torch.Tensor and g.stride() == s.stride() and g.dtype == s.dtype and not g.is_inference()
            for g, s in zip(upstream, self.upstream)
        )

    def again(
        self, upstream: Sequence[torch.Tensor | None], stubs: Sequence[torch.Tensor], create_graph: bool
    ) -> Found:
        """`backward` by running the layer again, eagerly. stubs: what connects inputs to the graph before them."""
        layer = self.layer()
        if layer is None or not self.state.matches(layer):
            raise RuntimeError(
                "fastft: a layer (its adapters, mode or parameters) was changed between a forward that was replayed as "
                "a CUDA graph and a backward that has to run it again: patch with cuda_graphs=False"
            )
        with torch.enable_grad():
            inputs = [t.detach().clone() for t in self.statics]
            for i, stub in zip(self.differentiable, stubs):
                inputs[i] = _Refill.apply(stub, inputs[i]) if create_graph else inputs[i].requires_grad_()  # type: ignore[assignment]
            with self.autocast(True):
                out = self._call(inputs, KEPT)
            ys = [t for t, learns in zip(out.tensors, self.learns) if learns]
            live = [(y, g) for y, g in zip(ys, upstream) if g is not None]
            sources = [inputs[i] for i in self.differentiable] + [p for p, _ in self.parameters]
            with self.autocast(False):
                found = torch.autograd.grad(
                    [y for y, _ in live], sources, [g for _, g in live], create_graph=create_graph, allow_unused=True
                )
        return list(found)


class _Stub(torch.autograd.Function):
    """Stands in the graph where x does, without its memory."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad


class _Refill(torch.autograd.Function):
    """The values of a tensor for which a stub stood."""

    @staticmethod
    def forward(ctx, stub: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad, None


class Call:
    """One replayed forward. It waits for its backward until autograd lets go of what the node has saved: after a
    backward that does not retain the graph, or when the graph is dropped."""

    def __init__(
        self, captured: Captured, index: int, sequence: int, backward: Callable[[Call, tuple, tuple, bool], Found]
    ):
        self.captured, self.index, self.sequence, self._backward = captured, index, sequence, backward
        self.versions = captured.state.versions()
        self.stubs: Tensors | None = None
        self.token: Callable[[], object] = lambda: None

    def apply(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The layer's output for a call whose tensors are loaded."""
        captured = self.captured
        differentiable = [tensors[i] for i in captured.differentiable]
        self.stubs = [_Stub.apply(x) for x in differentiable]  # type: ignore[misc]
        if not self.stubs:
            self.stubs = [torch.empty(0, device=captured.device)]
        self.token = weakref.ref(self.stubs[0])
        found = _ReplayedLayer.apply(self, *differentiable, *(p for p, _ in captured.parameters))
        self.stubs = None
        return rebuild(captured.output, list(found))  # type: ignore[arg-type]

    def backward(self, upstream: tuple, stubs: tuple, create_graph: bool) -> Found:
        if self.captured.state.versions() != self.versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                "parameter or buffer of a layer that was replayed as a CUDA graph"
            )
        return self._backward(self, upstream, stubs, create_graph)


class _ReplayedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, *differentiable: torch.Tensor):
        ctx.set_materialize_grads(False)
        outputs = call.captured.forward()
        ctx.mark_non_differentiable(*(t for t, learns in zip(outputs, call.captured.learns) if not learns))
        assert call.stubs is not None
        ctx.save_for_backward(*call.stubs)
        ctx.call = call
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *upstream):  # type: ignore[override]
        stubs, call = ctx.saved_tensors, ctx.call  # (the first raises where the graph was freed, as stock does)
        learning = tuple(g for g, learns in zip(upstream, call.captured.learns) if learns)
        if all(g is None for g in learning):
            return (None,) * len(ctx.needs_input_grad)
        return None, *call.backward(learning, stubs, torch.is_grad_enabled())
