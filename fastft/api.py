"""patch, unpatch, patched, report: the whole of fastft for a model that is already there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from fastft.checkpointing.controller import control, controller_of, release
from fastft.checkpointing.policy import Policy, parse
from fastft.experts.structure import wide_experts
from fastft.graphs import attach as graphs
from fastft.kinds import kinds
from fastft.linear.float8_error import underflow_lines
from fastft.lm_head import trl_head
from fastft.lm_head.liger import refuse
from fastft.packing.hooks import attach, packing_of, teach_again
from fastft.packing.hooks import release as release_packing
from fastft.patching.float32_adapters import adapter_lines, cast_adapters, unwatch_adapters, watch_adapters
from fastft.patching.moved import follow_moves, moved_lines, unwatch_moves, watch_moves
from fastft.patching.patcher import apply_kinds, build_report, innermost, strict_check, undo
from fastft.patching.report import PatchReport, Row
from fastft.swapping.walk import modules_of, parameters_of

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    *,
    strict: bool = False,
    activation_policy: str | int | Policy | None = None,
    unpad: bool | None = None,
    cuda_graphs: bool | str | None = None,
) -> Model:
    """Swap on this instance every module for which a faster equivalent is recognised and proven.

    Works on a bare transformers model, a PEFT model, a quantised one, one with a device map. Patching again extends to
    modules that are new and changes nothing else. A model that is moved or cast afterwards is proven again at its next
    forward, or when patched again (do so before torch.compile). No other model, class or library is touched.

    Args:
        model: the model, changed in place.
        strict: raise where anything that a recogniser looked at stays stock.
        activation_policy: which layers keep their activations for the backward, see fastft/checkpointing/policy.py:
            "trainer" (the default of a first patch: those that the trainer does not checkpoint), "auto", "none",
            "lean", "full", "offload", a number of layers to recompute, or a memory budget such as "20GiB". Gradients
            are the same bits under all of them.
        unpad: whether padded training batches run without their padding, see fastft/packing/packing.py. None (the
            default of a first patch): where that is provably the same; True: also where dropout is on, which then draws
            other values of the same distribution; False: never. Either way only where nothing that leaves the model
            depends on the padding; logits that are read are a second, padded forward's.
        cuda_graphs: whether a training call of a decoder layer that has come twice is replayed as a CUDA graph, after a
            proof on the batch, see docs/GRAPHS.md. "auto" (None at a first patch): where the model is on a CUDA device
            of compute capability 7.0 or more; True: the same, and the report says why where nothing can be; False:
            never.

    Returns:
        The same instance.

    Raises:
        TypeError: `model` is no torch module.
        PolicyError, GraphsError: `activation_policy` or `cuda_graphs` is none of the above.
        LigerError: Liger's kernels stand on the model.
        StrictError: with strict=True; the model is restored first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fastft.patch: want a torch.nn.Module (a transformers or PEFT model), got {type(model).__name__}"
        )
    policy = None if activation_policy is None else parse(activation_policy)
    graphs.check(cuda_graphs)
    refuse(modules_of(innermost(model)), "set it to False, or train without fastft")
    cuda = {t.device for t in parameters_of(model) if t.device.type == "cuda"}
    # the user's random stream stands where it stood: proofs draw from a copy
    with torch.random.fork_rng(devices=list(cuda)):
        adapters = cast_adapters(model, innermost(model))  # before anything is proven for their dtype
        follow_moves(model)
        apply_kinds(model, kinds())
        base = innermost(model)
        trl_head.watch(model, base)
        trl_head.bind(base)
    watch_adapters(model, base, adapters)
    watch_moves(model, kinds, _renew)  # in front of the hooks that look at the batch
    attach(model, base, unpad)
    if policy is not None or controller_of(base) is None:
        control(base, policy or Policy())
    graphs.attach(base, cuda_graphs)
    if strict:
        try:
            strict_check(report(model))
        except Exception:
            unpatch(model)
            raise
    return model


def _renew(base: nn.Module) -> None:
    """Renew what was built over the swaps (packing, CUDA graphs) of a model that has moved."""
    teach_again(base)
    graphs.renew(base)


def unpatch(model: Model) -> Model:
    """Restore every swapped instance exactly: class, __dict__, outputs bit for bit.

    Args:
        model: a patched model, or part of one; a stock one stays as it is.

    Returns:
        The same instance.

    Raises:
        RuntimeError: somebody else has changed the class of a swapped module.
    """
    base = innermost(model)
    trl_head.release(base)
    trl_head.unwatch(model, base)
    release(base)
    release_packing(model, base)
    unwatch_moves(model)
    unwatch_adapters(model, base)
    undo(model)
    return model


@contextmanager
def patched(
    model: Model,
    *,
    strict: bool = False,
    activation_policy: str | int | Policy | None = None,
    unpad: bool | None = None,
    cuda_graphs: bool | str | None = None,
) -> Iterator[Model]:
    """`with fastft.patched(model): ...` trains inside with the swaps, and is stock again outside, also after an
    exception.

    Args:
        model, strict, activation_policy, unpad, cuda_graphs: as `patch` takes them.

    Returns:
        A context manager that gives the same instance.

    Raises:
        As `patch`.
    """
    patch(model, strict=strict, activation_policy=activation_policy, unpad=unpad, cuda_graphs=cuda_graphs)
    try:
        yield model
    finally:
        unpatch(model)


def report(model: nn.Module) -> PatchReport:
    """What runs where, with the proofs' errors; and what stays stock, and why.

    Args:
        model: a patched model. It is only read: nothing is bound, proven or counted.

    Returns:
        The report; `print` shows it as a table.

    Raises:
        ValueError: the model is not patched.
    """
    found = build_report(model)
    found = replace(found, notes=(*found.notes, *moved_lines(model), *adapter_lines(innermost(model))))
    if getattr(innermost(model), "is_loaded_in_4bit", False) and (left := wide_experts(model)):
        found = replace(found, notes=(*found.notes, left))
    if (controller := controller_of(innermost(model))) is not None:
        found = replace(found, notes=(*found.notes, *controller.lines()))
    found = replace(found, notes=(*found.notes, *graphs.lines(innermost(model)), *underflow_lines(innermost(model))))
    if (packing := packing_of(innermost(model))) is not None:
        found = replace(
            found, rows=(*found.swapped, *packing.rows(), *found.stock), notes=(*found.notes, *packing.lines())
        )
    proof = trl_head.standing(innermost(model))
    if proof is None:
        return found
    numbers = (proof.error, proof.stock_error, proof.dtype)
    row = Row(trl_head.KIND, "TRL's forward", 1, trl_head.KERNEL if proof.ok else "", *numbers, reason=proof.reason)
    return replace(
        found, rows=(*found.swapped, *([row] if proof.ok else []), *found.stock, *([] if proof.ok else [row]))
    )
