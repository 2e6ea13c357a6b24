"""Observe: run the stock model once on a few tokens and note, per module, what it received and returned.

The run is a forward on the meta device: the real code on the real modules, no arithmetic and no memory, so that an 8B
model takes well under a second. Parameters and buffers are exchanged for meta tensors meanwhile, and adapter and
quantised layers answer with an empty tensor of their output's shape. Identity is what matters here: linears that are
given *the same tensor object* form a group. Nothing that is recorded needs a backward pass (gradients are the proofs'
business), so none is run.

Code that reads a value on the host (a router that counts its tokens) cannot run on the meta device. A small model, or
one on a GPU, is then run for real; in a large one the module that failed is taken to return what its input looks like,
and the run is repeated. What the text inputs do not reach (a vision tower) is run by itself, on inputs read off its
signature and configuration."""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from fastft.compat.accelerate_private import OLD_FORWARD
from fastft.compat.torch_private import COMPILED_CALL, HOOK_TABLES, TorchDispatchMode
from fastft.patching.observation_inputs import _bytes, text_inputs, tower_inputs
from fastft.swapping.rebind import global_calls, rebind
from fastft.swapping.swap import Fast, Replacement, as_stock, install, obstacle, order, uninstall

# parameters' bytes up to which a model that the meta device cannot follow is run for real on a CPU
REAL_RUN_LIMIT = 1 << 30
STAND_INS = 8  # classes of modules that may be stood in for before the observation is given up


@dataclass
class ModuleCall:
    """One call of a module. Tensors are fakes (or tiny); `inputs` are the tensors among the positional, then keyword,
    arguments."""

    index: int
    parent: nn.Module | None
    inputs: list[torch.Tensor]
    output: object = None
    n_args: int = 0
    kwargs: tuple[str, ...] = ()


@dataclass
class FunctionCall:
    """One call of a free function by a module's forward."""

    args: tuple
    kwargs: dict
    output: object


@dataclass
class Observation:
    """calls: by module, in order. functions: by (module, global name), the calls of the free functions that were asked
    for."""

    calls: dict[nn.Module, list[ModuleCall]] = field(default_factory=dict)
    functions: dict[tuple[nn.Module, str], list[FunctionCall]] = field(default_factory=dict)
    error: str = ""
    real: bool = False

    def forget(self) -> None:
        """Calls refer to modules, modules to calls: let go of them as soon as the observation has served."""
        for calls in self.calls.values():
            calls.clear()
        self.calls.clear()
        self.functions.clear()

    def of(self, module: nn.Module) -> list[ModuleCall]:
        return self.calls.get(module, [])

    def input_dtype(self, module: nn.Module) -> torch.dtype | None:
        for call in self.of(module):
            for t in call.inputs:
                if t.is_floating_point():
                    return t.dtype
        return None

    def last_dim(self, module: nn.Module) -> int | None:
        for call in self.of(module):
            for t in call.inputs:
                if t.is_floating_point() and t.dim():
                    return t.shape[-1]
        return None


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)


@contextmanager
def _attributes_kept(model: nn.Module):
    """Whatever a forward leaves on a module (cached tables, counters, replaced buffers) is taken back."""
    kept = [(m, dict(m.__dict__), dict(m._buffers), dict(m._parameters)) for m in model.modules()]
    try:
        yield
    finally:
        for m, attributes, buffers, parameters in kept:
            for k in [k for k in m.__dict__ if k not in attributes]:
                del m.__dict__[k]
            m.__dict__.update(attributes)
            m._buffers.clear()
            m._buffers.update(buffers)
            m._parameters.clear()
            m._parameters.update(parameters)


def _without_hooks(model: nn.Module, real: bool) -> None:
    """Inside `_attributes_kept`: nobody's hooks run, as what they would do is not undone by putting attributes back
    (FSDP2 starts its state in the first forward that it sees, a user's hook counts). Accelerate's hook, which is a
    forward of the instance, stays in a real run: it brings inputs to a module's device."""
    for m in model.modules():
        for name in HOOK_TABLES:
            if m.__dict__.get(name):
                m.__dict__[name] = OrderedDict()
        if COMPILED_CALL in m.__dict__:
            m.__dict__[COMPILED_CALL] = None
        if not real and OLD_FORWARD in m.__dict__:
            m.__dict__.pop("forward", None)


def _exchange_tensors(model: nn.Module, real: bool) -> None:
    """Inside `_attributes_kept`. Meta: every parameter, buffer and tensor attribute becomes a meta tensor (tied ones
    stay tied). Real: buffers become copies, as a forward may write into them."""
    known: dict[int, torch.Tensor] = {}

    def exchanged(t: torch.Tensor) -> torch.Tensor:
        if id(t) not in known:
            if real:
                known[id(t)] = t.detach().clone()
            else:
                empty = torch.empty(t.shape, dtype=t.dtype, device="meta")
                known[id(t)] = nn.Parameter(empty, requires_grad=False) if isinstance(t, nn.Parameter) else empty
        return known[id(t)]

    for m in model.modules():
        if not real:
            m.__dict__["_parameters"].update({n: exchanged(p) for n, p in m._parameters.items() if p is not None})
            m.__dict__.update({k: exchanged(v) for k, v in m.__dict__.items() if isinstance(v, torch.Tensor)})
        m._buffers.update({n: exchanged(b) for n, b in m._buffers.items() if b is not None})


class _AssumeTrue(TorchDispatchMode):
    """A question to the host that is answered by yes or no (is nothing padded? is nothing packed?) is answered by yes
    on the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (
            func is torch.ops.aten._local_scalar_dense.default
            and args[0].dtype == torch.bool
            and args[0].device.type == "meta"
        ):
            return True
        return func(*args, **(kwargs or {}))


@order(-100)
class _Empty(Replacement):
    """Mixin of an adapter or quantised layer during a meta run: an empty tensor of the output's shape, nothing inside
    is called."""

    def forward(self, x, *args, **kwargs):
        weight = getattr(getattr(self, "base_layer", self), "weight", None)
        dtype = (
            weight.dtype
            if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
            else x.dtype
        )
        return x.new_empty((*x.shape[:-1], self.out_features), dtype=dtype)


@order(-100)
class _LikeInput(Replacement):
    """Mixin of a module that the meta device cannot follow: it is taken to return something like its first floating
    input."""

    def forward(self, *args, **kwargs):
        first = next((t for t in _tensors((*args, *kwargs.values())) if t.is_floating_point()), None)
        if first is None:
            raise RuntimeError(f"a {type(self).__name__} without a floating-point input")
        return torch.empty_like(first)


def _is_opaque(module: nn.Module) -> bool:
    """A linear layer that is more than its product: an adapter around one, or one with a quantised weight."""
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return False
    weight = module._parameters.get("weight")
    if hasattr(module, "base_layer") or weight is None:
        return hasattr(module, "base_layer")
    return type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() == 1


def _stand_in(model: nn.Module, failing: set[type], stack: ExitStack) -> set[nn.Module]:
    """Opaque linears and modules of the failing classes answer for themselves; returned: the modules inside them."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or obstacle(module):
            continue
        mixin = _LikeInput if _stock(module) in failing else _Empty if _is_opaque(module) else None
        if mixin is not None:
            inside.update(m for m in module.modules() if m is not module)
            install(module, "stand-in", mixin, None)
            stack.callback(uninstall, module, "stand-in")
    return inside


def _record(modules: list[nn.Module], seen: Observation, stack: ExitStack) -> list:
    """Hooks that note calls into `seen`; returned: the stack of modules that run, left as it was where an exception was
    raised."""
    running: list[tuple[nn.Module, ModuleCall]] = []
    counter = itertools.count()

    def before(module, args, kwargs):
        tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        call = ModuleCall(next(counter), running[-1][0] if running else None, tensors, None, len(args), tuple(kwargs))
        seen.calls.setdefault(module, []).append(call)
        running.append((module, call))

    def after(module, args, output):
        while running:
            top, call = running.pop()
            if top is module:
                call.output = output
                break

    for module in modules:
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after).remove)
    return running


def _tap(modules: list[nn.Module], seen: Observation, wanted: Callable[[Callable], bool], stack: ExitStack) -> None:
    """Listen to the free functions that forwards call, by the mechanism of every other swap: a rebound forward on the
    instance. A listener knows neither module nor observation: its class may live until the next garbage collection, and
    must not hold the model."""
    noted: list[tuple[int, str, FunctionCall]] = []

    def hand_over():
        for i, name, call in noted:
            seen.functions.setdefault((modules[i], name), []).append(call)
        noted.clear()

    stack.callback(hand_over)
    by_class = functools.cache(lambda cls: {n: f for n, f in global_calls(cls.forward).items() if wanted(f)})
    for i, module in enumerate(modules):
        if isinstance(module, Fast) or obstacle(module):
            continue
        functions = by_class(type(module))
        if not functions:
            continue

        def listener(name, fn, i=i):
            def listen(*args, **kwargs):
                call = FunctionCall(args, kwargs, None)
                noted.append((i, name, call))
                call.output = fn(*args, **kwargs)
                return call.output

            return listen

        try:
            forward = rebind(type(module).forward, {n: listener(n, f) for n, f in functions.items()})
        except TypeError:  # a decorator hides it: the recogniser says so
            continue
        install(module, "observe", type("Listening", (), {"forward": forward}), None)
        stack.callback(uninstall, module, "observe")


def _attempt(model, make_inputs, wanted, real: bool, failing: set[type]) -> tuple[Observation, list[nn.Module]]:
    """One run; (what was seen, the modules that were running when it broke off)."""
    device = next((p.device for p in model.parameters()), torch.device("cpu")) if real else torch.device("meta")
    seen = Observation(real=real)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(as_stock(model))
        stack.enter_context(_attributes_kept(model))
        _without_hooks(model, real)
        inside = set() if real else _stand_in(model, failing, stack)
        modules = [m for m in model.modules() if m not in inside]
        _tap(modules, seen, wanted, stack)
        running = _record(modules, seen, stack)
        _exchange_tensors(model, real)
        try:
            inputs = make_inputs(model, device)
            if not real:
                stack.enter_context(device)
                stack.enter_context(_AssumeTrue())
            model(**inputs)
        except Exception as e:
            seen.error = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else ''}"
        return seen, [m for m, _ in running]


def _best(model: nn.Module, make_inputs, wanted: Callable[[Callable], bool]) -> Observation:
    """The meta run where it reaches the end; else a real one where that is allowed; else meta runs with stand-ins."""
    seen, running = _attempt(model, make_inputs, wanted, False, set())
    first = next((p for p in model.parameters()), None)
    kind = first.device.type if first is not None else "cpu"
    if seen.error and kind != "meta" and (kind != "cpu" or _bytes(model) <= REAL_RUN_LIMIT):
        real, _ = _attempt(model, make_inputs, wanted, True, set())
        if not real.error or len(real.calls) >= len(seen.calls):
            return real
    failing: set[type] = set()
    best = seen
    while seen.error and running and running[-1] is not model and len(failing) < STAND_INS:
        culprit = next((m for m in reversed(running) if _stock(m) not in failing), model)
        if culprit is model:
            break
        failing.add(_stock(culprit))
        seen, running = _attempt(model, make_inputs, wanted, False, failing)
        if not seen.error or len(seen.calls) > len(best.calls):
            best = seen
    return best


def _stock(module: nn.Module) -> type:
    return next(
        c for c in type(module).__mro__ if not issubclass(c, (Fast, _LikeInput, _Empty)) and issubclass(c, nn.Module)
    )


def _unreached_towers(model: nn.Module, seen: Observation) -> Iterator[nn.Module]:
    """The outermost modules that can run by themselves (a configuration and a main input of their own) and did not
    run."""
    inside: set[nn.Module] = set()
    for m in model.modules():
        if m is model or m in inside or m in seen.calls:
            continue
        if hasattr(m, "config") and hasattr(m, "main_input_name") and hasattr(m, "get_input_embeddings"):
            inside.update(m.modules())
            yield m


def observe(model: nn.Module, wanted: Callable[[Callable], bool] = lambda fn: False) -> Observation:
    """Run `model` in evaluation mode (nothing is dropped) on a few tokens; afterwards the model, its random state and
    its hooks are as before.

    wanted: which of the free functions that forwards call by a global name are recorded too.
    """
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        seen = _best(model, text_inputs, wanted)
        for tower in _unreached_towers(model, seen):
            part = _best(tower, tower_inputs, wanted)
            if part.error:
                continue  # its modules stay unobserved: recognisers say what that means for them
            for module, calls in part.calls.items():
                seen.calls.setdefault(module, calls)
            for key, calls in part.functions.items():
                seen.functions.setdefault(key, calls)
    finally:
        for m, mode in modes:
            m.training = mode
    return seen
