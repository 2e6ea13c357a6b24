"""Observe: run the stock model once on a few tokens and note, per module, what it received and returned.

The run is a forward on the meta device: the real code on the real modules, no arithmetic and no memory, so that an 8B
model takes well under a second. Parameters and buffers are exchanged for meta tensors meanwhile, and adapter and
quantised layers answer with an empty tensor of their output's shape. Identity is what matters here: linears that are
given *the same tensor object* form a group. Nothing that is recorded needs a backward pass (gradients are the proofs'
business), so none is run.

Code that reads a value on the host (a router that counts its tokens) cannot run on the meta device. A small model, or
one on a GPU, is then run for real; in a large one the module that failed is taken to return what its input looks like,
and the run is repeated. What the text inputs do not reach (a vision tower) is run by itself, on inputs read off its
signature and configuration.

Of layers that are alike (`twins`) the first alone is run: the others answer with what it returned, where they are
called as often and as it was. Where one is not, all of them are run."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from fastft.compat.accelerate_private import OLD_FORWARD
from fastft.compat.bitsandbytes_private import REPACKS
from fastft.compat.torch_private import COMPILED_CALL, HOOK_TABLES, TorchDispatchMode
from fastft.patching.observation_inputs import _bytes, text_inputs, tower_inputs
from fastft.patching.stand_ins import AsFirst, observed_class, stand_in
from fastft.patching.twins import Twins, find_twins, hollow
from fastft.proving.tensors import tensors_in
from fastft.swapping.rebind import global_calls, rebind
from fastft.swapping.swap import Fast, as_stock, install, obstacle, uninstall
from fastft.swapping.walk import modules_of

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
    for. twins: layers whose inside was not run, as they were called as another of their kind."""

    calls: dict[nn.Module, list[ModuleCall]] = field(default_factory=dict)
    functions: dict[tuple[nn.Module, str], list[FunctionCall]] = field(default_factory=dict)
    error: str = ""
    real: bool = False
    twins: Twins = field(default_factory=Twins)

    def forget(self) -> None:
        """Calls refer to modules, modules to calls: let go of them as soon as the observation has served."""
        for calls in self.calls.values():
            calls.clear()
        self.calls.clear()
        self.functions.clear()
        self.twins.forget()

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


@contextmanager
def _attributes_kept(model: nn.Module):
    """Whatever a forward leaves on a module (cached tables, counters, replaced buffers) is taken back."""
    kept = [(m, dict(m.__dict__), dict(m._buffers), dict(m._parameters)) for m in modules_of(model)]
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


def _without_side_effects(model: nn.Module, real: bool) -> None:
    """Inside `_attributes_kept`: nobody's hooks run, as what they would do is not undone by putting attributes back
    (FSDP2 starts its state in the first forward that it sees, a user's hook counts). Accelerate's hook, which is a
    forward of the instance, stays in a real run: it brings inputs to a module's device. The hook at which other threads
    wait meanwhile (`Moved`) stays. And bitsandbytes rewrites no 4-bit weight for inference on a CPU, which it cannot
    train after."""
    for m in modules_of(model):
        if REPACKS in m.__dict__:
            m.__dict__[REPACKS] = False
        for name in HOOK_TABLES:
            if table := m.__dict__.get(name):
                stays = [(k, hook) for k, hook in table.items() if getattr(hook, "stays_while_observed", False)]
                m.__dict__[name] = OrderedDict(stays)
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

    for m in modules_of(model):
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


def _record(modules: list[nn.Module], seen: Observation, stack: ExitStack) -> list:
    """Hooks that note calls into `seen`; returned: the stack of modules that run, left as it was where an exception was
    raised. (Another thread that has waited for the observation to end may be left with such a hook in its hand.)"""
    mine = threading.get_ident()
    running: list[tuple[nn.Module, ModuleCall]] = []
    counter = itertools.count()

    def before(module, args, kwargs=None):
        if kwargs is None or threading.get_ident() != mine:
            return
        tensors = tensors_in((*args, *kwargs.values()))
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


def _attempt(
    model, make_inputs, wanted, real: bool, failing: set[type], twins: Twins | None = None
) -> tuple[Observation, list[nn.Module]]:
    """One run; (what was seen, the modules that were running when it broke off). twins: are hollow."""
    device = next((p.device for p in model.parameters()), torch.device("cpu")) if real else torch.device("meta")
    seen = Observation(real=real)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(as_stock(model))
        stack.enter_context(_attributes_kept(model))
        _without_side_effects(model, real)
        inside = set() if real else stand_in(model, failing, stack)
        if twins is not None:
            for layer, first in twins.first.items():
                install(layer, "stand-in", AsFirst, (seen, first))
                stack.callback(uninstall, layer, "stand-in")
        modules = [m for m in modules_of(model) if m not in inside]
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
        culprit = next((m for m in reversed(running) if observed_class(m) not in failing), model)
        if culprit is model:
            break
        failing.add(observed_class(culprit))
        seen, running = _attempt(model, make_inputs, wanted, False, failing)
        if not seen.error or len(seen.calls) > len(best.calls):
            best = seen
    return best


def _unreached_towers(model: nn.Module, seen: Observation) -> Iterator[nn.Module]:
    """The outermost modules that can run by themselves (a configuration and a main input of their own) and did not
    run."""
    inside: set[nn.Module] = set()
    for m in modules_of(model):
        if m is model or m in inside or m in seen.calls:
            continue
        if hasattr(m, "config") and hasattr(m, "main_input_name") and hasattr(m, "get_input_embeddings"):
            inside.update(modules_of(m))
            yield m


def observe(model: nn.Module, wanted: Callable[[Callable], bool] = lambda fn: False, alike: bool = True) -> Observation:
    """Run `model` in evaluation mode (nothing is dropped) on a few tokens; afterwards the model, its random state and
    its hooks are as before.

    wanted: which of the free functions that forwards call by a global name are recorded too. alike: of layers that are
    alike the first may stand for all; not where they are sharded, each by units of its own.
    """
    modes = [(m, m.training) for m in modules_of(model)]
    try:
        for m, _ in modes:
            m.__dict__["training"] = False
        twins = find_twins(model) if alike else Twins()
        if twins.first:
            with hollow(twins):
                seen = _all_reached(model, wanted, twins)
            if not seen.error and all(len(seen.of(layer)) == len(seen.of(f)) for layer, f in twins.first.items()):
                seen.twins = twins
                return seen
        return _all_reached(model, wanted, None)
    finally:
        for m, mode in modes:
            m.__dict__["training"] = mode


def _all_reached(model: nn.Module, wanted: Callable[[Callable], bool], twins: Twins | None) -> Observation:
    """The model by its text inputs, and towers that these do not reach; twins: one run on the meta device, or none."""

    def run(part: nn.Module, make_inputs) -> Observation:
        if twins is None:
            return _best(part, make_inputs, wanted)
        here = {m for m in modules_of(part) if m in twins.first}
        first = {layer: f for layer, f in twins.first.items() if layer in here}
        return _attempt(part, make_inputs, wanted, False, set(), Twins(first))[0]

    seen = run(model, text_inputs)
    if twins is not None and seen.error:
        return seen
    for tower in _unreached_towers(model, seen):
        part = run(tower, tower_inputs)
        if part.error and twins is None:
            continue  # its modules stay unobserved: recognisers say what that means for them
        seen.error = part.error or seen.error
        for module, calls in part.calls.items():
            seen.calls.setdefault(module, calls)
        for key, calls in part.functions.items():
            seen.functions.setdefault(key, calls)
    return seen
