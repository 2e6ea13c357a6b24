"""The forwards under way, seen from the modules through which they enter: what they were given, and what they return.

An unpadded batch has no hidden states at its padding, so the decision is made by what the whole forward returns: a loss
of labels none of which is predicted from the padding, TRL's fields by token (zero where no label counts), or what is
pooled from real tokens. Logits are lazy, and are handed out as a `Reread`: a second, padded forward when somebody looks
at them, in the state that the first one saw."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastft.compat.peft_private import ACTIVE, DISABLED
from fastft.compat.torch_private import tree_leaves
from fastft.compat.trl_private import FUSED
from fastft.errors import FastftError
from fastft.lm_head.lazy_tensor import LazyTensor
from fastft.lm_head.trl_head import places
from fastft.packing.batch import Labels, Unpadded
from fastft.packing.padded_rerun import Reread, Source

_PLAIN = (torch.Tensor, nn.Parameter)
_ADAPTERS = (DISABLED, ACTIVE, "scaling", "merged_adapters")


class RereadError(FastftError, RuntimeError):
    """Logits of an unpadded forward that can no longer be computed."""


class ActiveForwards(threading.local):
    """Of one model and one thread: forwards that were entered and not left, outermost first. padded: a second forward
    is running."""

    def __init__(self):
        self.frames: list[ForwardFrame] = []
        self.padded = False


@dataclass(eq=False)
class ForwardFrame:
    """One forward. given: its arguments by name, None where that cannot be told. rows: how its batch was unpadded, if
    it was.
    by_token: what it returns by token must be read again (labels); else all of it is right as it is."""

    module: weakref.ref[nn.Module]
    args: tuple
    kwargs: dict
    given: dict | None
    random: list[tuple[torch.device, torch.Tensor]]
    grad: bool = field(default_factory=torch.is_grad_enabled)
    rows: Unpadded | None = None
    by_token: bool = True
    state: list = field(default_factory=list)
    autocast: list[tuple[str, bool, torch.dtype]] = field(default_factory=list)

    @property
    def labels(self) -> Labels | None:
        """None: no label by token is given."""
        given = self.given or {}
        shifted = given.get("shift_labels")
        labels = given.get("labels") if shifted is None else shifted
        return (
            Labels(labels, shifted is not None)
            if isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point()
            else None
        )

    def is_fused(self, base: nn.Module) -> bool:
        """Is this TRL's forward, whose fields by token are zero where no label counts?"""
        return bool((self.given or {}).get(FUSED)) and any(places(base.__dict__, "forward"))

    def note(self, module: nn.Module) -> None:
        """The state in which a second forward gives what this one would."""
        self.state = _state(module, (self.args, self.kwargs))
        types = {"cpu", *(t.device.type for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, torch.Tensor))}
        self.autocast = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in sorted(types)]

    def again(self, underway: ActiveForwards) -> Any:
        """The output of the padded forward."""
        module = self.module()
        now = None if module is None else _state(module, (self.args, self.kwargs))
        if (
            module is None
            or now is None
            or len(now) != len(self.state)
            or any(a != b for a, b in zip(now[1:], self.state[1:]))
        ):
            raise RereadError(
                "logits of a batch that ran without its padding: want the parameters, buffers and inputs of that "
                "forward, got changed ones; "
                "read `logits` before the optimizer's step, or patch with unpad=False"
            )
        training = [(m, m.training) for m in module.modules()]
        before, underway.padded = underway.padded, True
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(_random(self.random))
                stack.enter_context(torch.set_grad_enabled(self.grad))
                for kind, on, dtype in self.autocast:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=on))
                for m, was in zip(module.modules(), self._training):
                    m.training = was
                return module.forward(*self.args, **self.kwargs)
        finally:
            underway.padded = before
            for m, was in training:
                m.training = was

    @functools.cached_property
    def _training(self) -> list[bool]:
        return self.state[0] if self.state else []


def _state(module: nn.Module, inputs) -> list:
    """What a forward reads, by version: training flags first, then tensors, then which adapters are on."""
    found: list = [[]]
    for m in module.modules():
        found[0].append(m.training)
        for table in (m._parameters, m._buffers):
            found += [
                (id(t), t._version, t.data_ptr() if type(t) in _PLAIN else 0) for t in table.values() if t is not None
            ]
        if DISABLED in m.__dict__:
            found.append(repr([m.__dict__.get(n) for n in _ADAPTERS]))
    found += [(id(t), t._version) for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    return found


def random_state(device: torch.device) -> list[tuple[torch.device, torch.Tensor]]:
    """(device, state of its random generator) of the CPU and of `device`."""
    found = [(torch.device("cpu"), torch.get_rng_state())]
    if device.type not in ("cpu", "meta"):
        found.append((device, torch.get_device_module(device).get_rng_state(device)))
    return found


@contextmanager
def _random(states: list[tuple[torch.device, torch.Tensor]]) -> Iterator[None]:
    kinds = {d.type: d for d, _ in states if d.type != "cpu"}
    with ExitStack() as stack:
        for kind, device in kinds.items():
            stack.enter_context(torch.random.fork_rng([device], device_type=kind))
        if not kinds:
            stack.enter_context(torch.random.fork_rng([]))
        for device, state in states:
            torch.set_rng_state(state) if device.type == "cpu" else torch.get_device_module(device).set_rng_state(
                state, device
            )
        yield


@functools.cache
def _names(cls: type) -> tuple[str, ...] | None:
    kinds = list(inspect.signature(cls.forward).parameters.values())[1:]
    if any(p.kind is p.VAR_POSITIONAL for p in kinds):
        return None
    return tuple(n.name for n in kinds if n.kind is n.POSITIONAL_OR_KEYWORD)


def named(module: nn.Module, args: tuple, kwargs: dict, inside: nn.Module | None = None) -> dict | None:
    """All arguments by name; None where that cannot be told. inside: to whom a module that takes anything hands them
    on."""
    if not args:
        return kwargs
    names = _names(type(module))
    if names is None and inside is not None:
        names = _names(type(inside))
    return None if names is None or len(args) > len(names) else {**dict(zip(names, args)), **kwargs}


def protect(output, frame: ForwardFrame, underway: ActiveForwards, on_read, has_bias: bool):
    """The output of an unpadded forward as a caller may have it; or why it cannot be: then the forward must be run
    again, padded."""
    if not frame.by_token or frame.rows is None:
        return output
    shape = (frame.rows.rows, frame.rows.length)
    items = (
        list(output.items())
        if isinstance(output, dict)
        else list(enumerate(output))
        if isinstance(output, tuple)
        else []
    )
    if not items:
        return "what it returns is no ModelOutput, dict or tuple"
    lazy, seen = {}, {}

    def second(key):
        if "out" not in seen:
            seen["out"] = frame.again(underway)
            on_read()
        return seen["out"][key]

    padding, module = frame.rows.padding, frame.module()
    read = () if module is None else (*module.parameters(), *tree_leaves((frame.args, frame.kwargs)))
    leaves = [t for t in read if isinstance(t, torch.Tensor) and t.requires_grad]
    for key, value in items:
        if isinstance(value, LazyTensor) and value.dim() > 2 and tuple(value.shape[:2]) == shape:
            lazy[key] = Reread.make(value, Source(functools.partial(second, key), padding, has_bias, leaves))
        elif any(isinstance(t, torch.Tensor) and t.dim() > 0 for t in tree_leaves(value)):
            return f"what it returns as {key} is made at once"
    if isinstance(output, tuple):
        return tuple(lazy.get(i, v) for i, v in items)
    for key, value in lazy.items():
        output[key] = value
    return output
