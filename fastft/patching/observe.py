"""Observe: run the stock model once on a few tokens and note, per module, what it received and returned.

The run is a forward under fake tensors: the real code on the real modules, no arithmetic and no memory, so that an 8B model takes
about a second. Identity is what matters here: linears that are given *the same tensor object* form a group. Nothing that is recorded
needs a backward pass (gradients are the proofs' business), so none is run. Where fake tensors cannot follow (code that reads a value on
the host), a small model is run for real instead; what was reached before an exception is kept, and the exception is in the report.
"""

from __future__ import annotations

import inspect
import itertools
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastft.patching.rebind import global_calls, rebind
from fastft.patching.swap import Fast, install, obstacle, uninstall

TOKENS = (2, 8)
REAL_RUN_LIMIT = 1 << 30  # parameters' bytes up to which a model that fake tensors cannot follow is run for real on a CPU


@dataclass
class Call:
    """One call of a module. Tensors are fakes (or tiny); `inputs` are the tensors among the positional, then keyword, arguments."""

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
    """calls: by module, in order. functions: by (module, global name), the calls of the free functions that were asked for."""

    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    functions: dict[tuple[nn.Module, str], list[FunctionCall]] = field(default_factory=dict)
    error: str = ""
    real: bool = False

    def of(self, module: nn.Module) -> list[Call]:
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


def _record(model: nn.Module, seen: Observation, stack: ExitStack) -> None:
    running: list[tuple[nn.Module, Call]] = []
    counter = itertools.count()

    def before(module, args, kwargs):
        tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        call = Call(next(counter), running[-1][0] if running else None, tensors, None, len(args), tuple(kwargs))
        seen.calls.setdefault(module, []).append(call)
        running.append((module, call))

    def after(module, args, output):
        while running:
            top, call = running.pop()
            if top is module:
                call.output = output
                break

    for module in model.modules():
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after).remove)


def _tap(model: nn.Module, seen: Observation, wanted: Callable[[Callable], bool], stack: ExitStack) -> None:
    """Listen to the free functions that forwards call, by the mechanism of every other swap: a rebound forward on the instance."""
    for module in model.modules():
        if obstacle(module) or isinstance(module, Fast):
            continue
        functions = {n: f for n, f in global_calls(type(module).forward).items() if wanted(f)}
        if not functions:
            continue

        def listener(name, fn, module=module):
            def listen(*args, **kwargs):
                call = FunctionCall(args, kwargs, None)
                seen.functions.setdefault((module, name), []).append(call)
                call.output = fn(*args, **kwargs)
                return call.output

            return listen

        try:
            forward = rebind(type(module).forward, {n: listener(n, f) for n, f in functions.items()})
        except TypeError:  # a decorator hides it: the recogniser says so
            continue
        install(module, "observe", type("Listening", (), {"forward": forward}), None)
        stack.callback(uninstall, module, "observe")


def _inputs(model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    forward = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab = getattr(text, "vocab_size", None) or 16
    ids = torch.arange(TOKENS[0] * TOKENS[1], device=device).remainder(max(1, min(vocab - 1, 97))).view(TOKENS)
    out = {}
    if "input_ids" in forward or any(p.kind is p.VAR_KEYWORD for p in forward.values()):
        out["input_ids"] = ids
    elif getattr(model, "main_input_name", None) in forward:
        raise TypeError(f"its main input is {model.main_input_name}, not input_ids")
    if "decoder_input_ids" in forward:
        out["decoder_input_ids"] = ids
    if "use_cache" in forward:
        out["use_cache"] = False
    return out


def observe(model: nn.Module, wanted: Callable[[Callable], bool] = lambda fn: False) -> Observation:
    """Run `model` once in training mode on a few tokens; afterwards the model, its random state and its hooks are as before.

    wanted: which of the free functions that forwards call by a global name are recorded too.
    """
    seen = Observation()
    first = next((p for p in model.parameters()), None)
    device = first.device if first is not None else torch.device("cpu")
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.train()
        for real in (False, True):
            if real:
                size = sum(p.numel() * p.element_size() for p in model.parameters())
                if device.type == "meta" or (device.type == "cpu" and size > REAL_RUN_LIMIT):
                    break
            attempt = Observation(real=real)
            with ExitStack() as stack:
                stack.enter_context(torch.random.fork_rng(devices=[device] if real and device.type == "cuda" else []))
                stack.enter_context(_attributes_kept(model))
                if not real:
                    stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                _tap(model, attempt, wanted, stack)
                _record(model, attempt, stack)
                try:
                    model(**_inputs(model, device))
                    return attempt
                except Exception as e:
                    attempt.error = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else ''}"
            if not seen.calls or len(attempt.calls) >= len(seen.calls):
                seen = attempt
    finally:
        for m, mode in modes:
            m.training = mode
    return seen
