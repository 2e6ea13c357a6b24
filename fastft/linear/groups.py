"""Linear groups: linears that are given the same tensor object run as one autograd function.

Which ones do is observed, not named. The first member that is called computes all of them and leaves the others'
results in the group, recognised by the identity of the input; each member then takes its own when it is called. So
nobody's forward is rewritten, hooks fire, and a member that is never called costs its product only. What was left is
dropped when the module that holds the members returns or
raises: an early-stopped recomputation, an exception, a generation loop leave nothing behind.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fastft.linear.float8_error import float8_note
from fastft.linear.group_forward import KIND, HolderCall, LinearGroup, mixin_of
from fastft.linear.group_proof import group_key, prove_group
from fastft.linear.projection import is_quantised_otherwise, is_unit, refusal
from fastft.linear.small_layers import device_of
from fastft.patching.kind import Candidate, Context
from fastft.patching.patcher import Outcome, Record, record_of
from fastft.proving.proof_cache import proof_of
from fastft.proving.prove import Proof, undisturbed
from fastft.swapping.out_of_memory import is_out_of_memory
from fastft.swapping.swap import (
    KEY,
    Replacement,
    install,
    is_fast,
    obstacle,
    order,
    slot_of,
    state_of,
    stock_class,
    swapped_in,
    uninstall,
)
from fastft.swapping.walk import modules_of
from fastft_kernels.recompute.replay import REPLAY
from fastft_kernels.runtime.compat import is_dynamo_compiling

HOLDER = "linear group holder"


@dataclass
class HolderGroups:
    """What a holder keeps: its groups, and per group the members' names below the holder, whole and in parts; name: the
    holder's in the patched model, whose record hears of members that join later."""

    record: Record
    name: str
    groups: list[tuple[LinearGroup, tuple[str, ...], tuple[tuple[str, ...], ...]]] = field(default_factory=list)

    def adopt(self, holder: nn.Module) -> None:
        """A member was wrapped or replaced since (an adapter was put on, or taken off): the module that stands there
        now joins."""
        for group, paths, steps in self.groups:
            new = []
            for i, path in enumerate(steps):
                now: Any = holder
                for part in path:
                    now = now._modules[part] if now is not None and part in now._modules else None
                former = group.refs[i]()
                if now is None or now is former:
                    continue
                if former is not None:
                    _release(former, group)
                group.refs[i] = weakref.ref(now)
                if not _belongs(now, group):  # (it does in a copy)
                    new.append((now, f"{self.name}.{paths[i]}" if self.name else paths[i]))
            if new:
                self._join(group, new)

    def drop_changed(self, holder: nn.Module) -> None:
        """Groups of which a member is not the one that it was are no groups any more: a patch finds them anew."""
        for held in list(self.groups):
            group, paths, _ = held
            if any(_below(holder, path) is not ref() for path, ref in zip(paths, group.refs)):
                self.groups.remove(held)
                for member in (*group.members, *(m for path in paths if (m := _below(holder, path)) is not None)):
                    _release(member, group)

    def dissolve(self) -> None:
        """Members that have left the model since, and that nobody else finds, are stock again too."""
        for group, _, _ in self.groups:
            for member in group.members:
                _release(member, group)

    def _join(self, group: LinearGroup, new: list[tuple[nn.Module, str]]) -> None:
        """Prove the group as it is now, once for all that are alike, and say in the record what came of it."""
        candidate = _candidate(group)
        proof = None
        for module, name in new:
            outcome = self.record.outcomes[KIND, name] = Outcome(KIND, stock_class(module).__name__, name)
            outcome.reason = refusal(module) or obstacle(module)
            if outcome.reason:
                continue
            if proof is None:
                proof = _proof_while_training(candidate)
            outcome.proof, outcome.reason = proof, proof.reason
            if proof.ok:
                outcome.kernel = candidate.kernel
                if not is_fast(module, KIND):
                    install(module, KIND, mixin_of(module), group)

    def add(self, group: LinearGroup, paths: tuple[str, ...]) -> None:
        """Take a group in, unless it is here already."""
        if all(g is not group for g, _, _ in self.groups):
            self.groups.append((group, paths, tuple(tuple(p.split(".")) for p in paths)))

    def begin(self) -> list[HolderCall | None]:
        """What members leave for each other from now on is this thread's; `end` of what this answers clears it."""
        before: list[HolderCall | None] = []
        for group, _, _ in self.groups:
            before += (group.now.call,)
            group.now.call = HolderCall()
        return before

    def end(self, before: list[HolderCall | None]) -> None:
        """The holder's forward has returned or raised."""
        for (group, _, _), was in zip(self.groups, before):
            group.now.call = was


def _proof_while_training(candidate: Candidate) -> Proof:
    """In the middle of a step memory may be short: that is no reason to stop a run which stock would go on with."""
    try:
        with undisturbed():
            return proof_of(KIND, candidate.key, candidate.device, candidate.prove)
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        return Proof(False, reason="no memory was left for its proof: it joins when the model is patched again")


def _below(holder: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = holder
    for part in path.split("."):
        if found is None:
            return None
        found = found._modules.get(part)
    return found


def _belongs(module: nn.Module, group: LinearGroup) -> bool:
    return is_fast(module, KIND) and state_of(module, KIND) is group


def _release(module: nn.Module, group: LinearGroup) -> None:
    """A former member, now inside its successor or gone, is stock again."""
    if _belongs(module, group):
        uninstall(module, KIND)


@order(5)
class Holder(Replacement):
    """Root of the per-class mixins of the modules that hold a group's members."""


@functools.cache
def holder_mixin(cls: type) -> type:
    """Mixin whose forward is the stock one between two duties: replaced members join before, what members left goes
    after."""

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        d = self.__dict__
        slot = d[KEY] if KEY in d else None
        # a replica's parts are no members
        if slot is None or is_dynamo_compiling() or slot.owner() is not self:
            return super(mixin, self).forward(*args, **kwargs)
        held: HolderGroups = slot.parts[HOLDER][1]
        held.adopt(self)
        if not torch.is_grad_enabled() and not REPLAY.first:  # the members are stock's own
            return super(mixin, self).forward(*args, **kwargs)
        before = held.begin()
        try:
            return super(mixin, self).forward(*args, **kwargs)
        finally:
            held.end(before)

    mixin: Any = type("FastHolder", (Holder,), {"forward": forward})
    return mixin


class LinearGroups:
    """Recognises linear layers that are given the same tensor object, and those with adapters."""

    name = KIND
    parts = (KIND, HOLDER)

    def __init__(self):
        self._groups: dict[nn.Module, tuple[nn.Module | None, LinearGroup, tuple[str, ...]]] | None = None
        self._float8_errors: dict = {}
        self._inner: set[nn.Module] = set()  # what lies inside an adapter layer is that layer's business

    def refresh(self, base: nn.Module) -> None:
        """Before a patch looks at the model: what was replaced since the last one leaves its group."""
        for module in swapped_in(base):
            if is_fast(module, HOLDER):
                state_of(module, HOLDER).drop_changed(module)

    def recognise(self, module: nn.Module, context: Context) -> Candidate | str | None:
        if self._groups is None:
            self._inner = {m for a in context.looked_at if _is_adapter(a) for m in modules_of(a)[1:]}
            self._groups = find_groups(context, self._inner)
        if not is_unit(module):
            if _is_adapter(module):
                return None if _on_a_stack(module) else "an adapter layer of another kind"
            return refusal(module) if is_quantised_otherwise(module) and module not in self._inner else None
        if module not in self._groups:
            return None
        groups, (holder, group, _) = self._groups, self._groups[module]
        if why_not := refusal(module) or context.sharding.is_apart(module):
            return why_not

        def apply(m: nn.Module) -> None:
            holder, group, paths = groups[m]
            install(m, KIND, mixin_of(m), group)
            if holder is None:
                return
            slot, record = slot_of(holder), record_of(context.model)
            assert record is not None
            if slot is None or HOLDER not in slot.parts:
                install(
                    holder,
                    HOLDER,
                    holder_mixin(stock_class(holder)),
                    HolderGroups(record, context.names[holder]),
                )
            held: HolderGroups = state_of(holder, HOLDER)
            held.add(group, paths)

        candidate = _candidate(group)
        candidate.apply = apply
        if len(group.refs) == 1 and holder is not None and context.sharding.units(module):
            candidate.note = _apart(module, context)
        fit = [m for m in group.members if is_unit(m) and not refusal(m)]
        candidate.note = "; ".join(n for n in (candidate.note, float8_note(fit, self._float8_errors)) if n)
        return candidate


def _candidate(group: LinearGroup) -> Candidate:
    """The proof of the members that the group function can express."""
    fit = [m for m in group.members if is_unit(m) and not refusal(m)]
    apply = lambda m: install(m, KIND, mixin_of(m), group)
    return Candidate(
        f"lora_linear(group of {len(fit)})",
        group_key(fit),
        lambda: prove_group(fit, _swap_siblings),
        apply,
        device=device_of(fit),
    )


def _swap_siblings(layers: list[nn.Module]) -> None:
    group = LinearGroup.of(layers)
    group.now.call = HolderCall()
    for layer in layers:
        install(layer, KIND, mixin_of(layer), group)


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def _on_a_stack(module: Any) -> bool:
    """An adapter on a 3-D parameter: experts', which are a kind of their own."""
    return hasattr(module, "parameter_name") and module.get_param().dim() == 3


def find_groups(
    context: Context, inner: set[nn.Module]
) -> dict[nn.Module, tuple[nn.Module | None, LinearGroup, tuple[str, ...]]]:
    """For every unit outside an output head and outside `inner`: the module that holds it, its group, and the members'
    names below the holder."""
    units = [m for m in context.looked_at if is_unit(m)]
    get = getattr(context.model, "get_output_embeddings", None)
    head: Any = None if get is None else get()
    saved = getattr(head, "modules_to_save", None)
    heads = {head} if saved is None else set(head.modules())  # PEFT's copies of a head that trains, and the original
    units = [u for u in units if u not in inner and u not in heads and getattr(u, "base_layer", None) is not head]

    names, parents = context.names, _parents(context)
    together: dict[tuple, list[nn.Module]] = {}
    for u in units:
        calls = context.seen.of(u)
        key = (id(calls[0].parent), id(calls[0].inputs[0])) if len(calls) == 1 and calls[0].inputs else ("alone", id(u))
        key += tuple(map(id, context.sharding.units(u)))  # a group reads what is gathered together
        together.setdefault(key, []).append(u)
    patterns: dict[type, set[tuple[str, ...]]] = {}
    found = {}
    for members in together.values():
        members.sort(key=lambda m: context.seen.of(m)[0].index if context.seen.of(m) else 0)
        calls = context.seen.of(members[0])
        holder = calls[0].parent if calls else parents.get(members[0])
        _add(found, holder, members, names)
        if calls and holder is not None and names.get(holder) is not None:
            patterns.setdefault(stock_class(holder), set()).add(_paths(holder, members, names))
    if context.seen.error:
        _extend(found, context, patterns, parents)
    _add_twins(found, context.seen.twins.of)
    return found


def _add_twins(found: dict, twins: dict[nn.Module, list[nn.Module]]) -> None:
    """The groups of layers that are alike: by the places of the first one's."""
    for holder, group, paths in list({id(entry[1]): entry for entry in found.values()}.values()):
        members = group.members
        if holder in twins:
            for its_holder, *its_members in zip(twins[holder], *(twins[m] for m in members)):
                entry = (its_holder, LinearGroup.of(its_members), paths)
                found |= dict.fromkeys(its_members, entry)
        else:
            found |= {t: (None, LinearGroup.of([t]), ()) for m in members if m in twins for t in twins[m]}


def _apart(module: nn.Module, context: Context) -> str:
    """What the report says of a layer that is gathered by itself while its siblings compute."""
    (unit,) = context.sharding.units(module)
    x = context.seen.of(module)[0].inputs[0] if context.seen.of(module) else None
    for other, calls in context.seen.calls.items():
        if other is not module and is_unit(other) and x is not None and calls[0].inputs and calls[0].inputs[0] is x:
            if unit not in context.sharding.units(other):
                return "computes for itself: it is sharded apart from the layers that are given the same input"
    return ""


def _parents(context: Context) -> dict[nn.Module, nn.Module]:
    return {child: m for m in context.looked_at for child in m._modules.values() if child is not None}


def _paths(holder: nn.Module, members: list[nn.Module], names: dict[nn.Module, str]) -> tuple[str, ...]:
    prefix = names[holder] + "." if names[holder] else ""
    return tuple(names[m].removeprefix(prefix) for m in members)


def _add(found: dict, holder: nn.Module | None, members: list[nn.Module], names: dict[nn.Module, str]) -> None:
    """One group, or, where no module can hold it, groups of one."""
    fit = holder is not None and not isinstance(holder, PreTrainedModel) and not obstacle(holder)
    fit = fit and holder in names and all(names[m].startswith(names[holder]) for m in members)
    if fit and holder is not None:
        group = LinearGroup.of(members)
        for m in members:
            found[m] = (holder, group, _paths(holder, members, names))
        return
    for m in members:
        found[m] = (None, LinearGroup.of([m]), ())


def _extend(found: dict, context: Context, patterns: dict[type, set[tuple[str, ...]]], parents: dict) -> None:
    """The observation broke off: layers behind it are grouped as layers of the same class before it. (A member that is
    then given
    another input than its siblings computes for itself: the identity of the input is checked at every call.)"""
    for holder in context.names:
        if context.seen.of(holder):
            continue
        for paths in patterns.get(stock_class(holder), ()):
            try:
                members = [holder.get_submodule(p) for p in paths]
            except AttributeError:
                continue
            if all(m in found and not context.seen.of(m) for m in members):
                _add(found, holder, members, context.names)
