"""What is asked of a lazy tensor that concerns its place in autograd's graph: requires_grad, grad_fn, grad, hooks,
retain_grad, backward, torch.autograd.grad. It is answered by the lazy tensor itself, which stands where stock's tensor
would, until its value has been written to: from then on by the value, as the name then means another node of the
graph."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastft.compat.sharding_private import is_engine_hook, is_fsdp_pre_backward
from fastft.compat.torch_private import TENSOR_HOOKS, tree_map_only, without_overrides
from fastft.lm_head.lazy_graph import through
from fastft.lm_head.lazy_tensor import LazyTensor, Node

T = torch.Tensor


def _value(x):
    return x.node.value("autograd") if isinstance(x, LazyTensor) else x


def _asked(func):
    """A handler that asks the wrapper itself, or its value where that was written to."""

    def ask(args, kwargs):
        lazy, *rest = args
        if not isinstance(lazy, LazyTensor):
            return func(lazy, *tree_map_only(LazyTensor, _value, rest), **kwargs)
        target = lazy if lazy.hangs else lazy.made
        with without_overrides():
            return func(target, *rest, **kwargs)

    return ask


def _grad_fn(args, kwargs):
    lazy = args[0]
    with without_overrides():
        if not lazy.hangs:
            return lazy.made.grad_fn
        grad_fn = lazy.grad_fn
    if grad_fn is not None and grad_fn is lazy.node.connect() and not lazy.node.apart:
        _expose(lazy, grad_fn)
    return grad_fn


def _expose(lazy: LazyTensor, grad_fn) -> None:
    """Whoever holds a node of the graph may hook it, or ask for the gradient that arrives there when the lazy tensor is
    gone."""
    if "register_prehook" in grad_fn.__dict__:
        return
    node, this = weakref.ref(lazy.node), weakref.ref(grad_fn)
    for name in ("register_hook", "register_prehook"):
        grad_fn.__dict__[name] = functools.partial(_hook_on_the_node, name, node, this)
    _watch(lazy)


def _hook_on_the_node(name: str, node: weakref.ref[Node], this: weakref.ref, hook):
    grad_fn: Any = this()
    if (n := node()) is not None:
        n.wanted += 1
        grad_fn.keep = grad_fn.keep or (None if grad_fn.local else n)
    return getattr(type(grad_fn), name)(grad_fn, hook)


def _watch(lazy: LazyTensor) -> None:
    for uses in lazy.uses:
        uses.watch()


def _register_hook(args, kwargs):
    lazy, hook = args[0], args[1] if len(args) > 1 else kwargs["hook"]
    with without_overrides():
        if not lazy.hangs:
            return T.register_hook(lazy.made, hook)
        handle = T.register_hook(lazy, hook)
        hooks = lazy._backward_hooks
    if is_fsdp_pre_backward(hook):
        lazy.node.family.gathers_before_backward(hook)
    elif not is_engine_hook(hook):
        lazy.node.hooks = hooks
        _watch(lazy)
    return handle


def _requires_grad_(args, kwargs):
    lazy = args[0]
    _set_requires_grad(lazy, args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
    return lazy


def _set_requires_grad(lazy: Any, on: bool) -> None:
    with without_overrides():
        if not lazy.hangs and lazy.made.requires_grad:
            lazy.made.requires_grad_(on)
            return
        lazy.requires_grad_(on)  # stock's error, where it is no leaf
        value = lazy.made
    if value is not None and lazy.stands is None and on:
        lazy.made = lazy.hang(through(value, lazy))
    elif value is not None and not on:
        lazy.made, lazy.stands = value.detach(), None


def _detach_(args, kwargs):
    """Detach in place: the lazy tensor gets a node of its own; what was made of it before keeps the former node."""
    lazy, before = args[0], args[0].node
    value = before.value("detach_").detach()
    with without_overrides():
        lazy.detach_()
    before.anchor()
    before.wrapper, before.kept = lambda: None, None
    with torch.no_grad():
        lazy.node = Node(T.detach, (value,), {}, before.family, before.meaning, None, before.big)
    lazy.node.made, lazy.node.wrapper = True, weakref.ref(lazy)
    lazy.made, lazy.stands = value, None
    return lazy


def _method_backward(args, kwargs):
    given = dict(zip(("tensors", "grad_tensors", "retain_graph", "create_graph", "inputs"), args))
    return _backward((), given | {"grad_tensors" if k == "gradient" else k: v for k, v in kwargs.items()})


def _backward(args, kwargs):
    """torch.autograd.backward: lazy tensors among the inputs keep their gradient, and are given by their edges."""
    names = ("tensors", "grad_tensors", "retain_graph", "create_graph", "grad_variables", "inputs")
    given = {k: v for k, v in (dict(zip(names, args)) | kwargs).items() if v is not None}
    inputs: Any = given.pop("inputs", None)
    if inputs is not None:
        inputs = (
            list(inputs.values()) if isinstance(inputs, dict) else [inputs] if isinstance(inputs, T) else list(inputs)
        )
        for i, x in enumerate(inputs):
            if isinstance(x, LazyTensor) and x.hangs and x.has_grad:
                x.retain_grad()
                inputs[i] = _edge(x)
    given, inputs = tree_map_only(LazyTensor, _value, (given, inputs))
    torch.autograd.backward(**given, **({} if inputs is None else {"inputs": inputs}))


def _grad(args, kwargs):
    """torch.autograd.grad: lazy tensors among the inputs are given by their edges."""
    names = (
        "outputs",
        "inputs",
        "grad_outputs",
        "retain_graph",
        "create_graph",
        "only_inputs",
        "allow_unused",
        "is_grads_batched",
        "materialize_grads",
    )
    given = dict(zip(names, args)) | kwargs
    inputs: Any = given["inputs"]
    if isinstance(inputs, dict):
        return dict(zip(inputs, _grad((), {**given, "inputs": tuple(inputs.values())})))
    inputs = [inputs] if isinstance(inputs, T) or not isinstance(inputs, (tuple, list)) else list(inputs)
    for name in ("outputs", "grad_outputs"):
        given[name] = tree_map_only(LazyTensor, _value, given.get(name))
    lazy = {i: x for i, x in enumerate(inputs) if isinstance(x, LazyTensor) and x.hangs and x.has_grad}
    given["inputs"] = [_edge(lazy[i]) if i in lazy else _value(x) for i, x in enumerate(inputs)]
    zeros = lazy and given.pop("materialize_grads", False)
    if zeros:
        given["allow_unused"] = True
    for x in lazy.values():
        x.node.wanted += 1
    try:
        found = torch.autograd.grad(**given)
    finally:
        for x in lazy.values():
            x.node.wanted -= 1
    if zeros:
        found = tuple(
            torch.zeros(x.shape, dtype=x.dtype, device=x.device) if g is None else g for g, x in zip(found, inputs)
        )
    return found


def _edge(lazy: LazyTensor) -> GradientEdge:
    with without_overrides():
        return get_gradient_edge(lazy) if lazy.grad_fn is None else GradientEdge(lazy.grad_fn, lazy.output_nr)


def answers() -> dict:
    """A table of handlers for functions that concern autograd alone."""
    names = (
        "requires_grad",
        "is_leaf",
        "grad",
        "retains_grad",
        "output_nr",
        *TENSOR_HOOKS,
    )
    table = {getattr(T, n).__get__: _asked(getattr(T, n).__get__) for n in names if hasattr(T, n)}
    table |= {
        f: _asked(f) for n in ("grad", TENSOR_HOOKS[0]) for f in (getattr(T, n).__set__, getattr(T, n).__delete__)
    }
    table |= {f: _asked(f) for f in (T.retain_grad, T.register_post_accumulate_grad_hook)}
    descriptors: Any = T
    table |= {
        descriptors.grad_fn.__get__: _grad_fn,
        T.register_hook: _register_hook,
        T.requires_grad_: _requires_grad_,
        T.detach_: _detach_,
    }
    table[descriptors.requires_grad.__set__] = lambda args, kwargs: _set_requires_grad(*args)
    return table | {
        T.backward: _method_backward,
        torch.autograd.backward: _backward,
        torch.autograd.grad: _grad,
        torch.detach_: _detach_,
    }
