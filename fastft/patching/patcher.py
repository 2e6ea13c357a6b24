"""Recognise, prove, swap, report over all modules of one model, and the exact undo."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastft.compat.accelerate_private import is_hooked
from fastft.compat.torch_private import COMPILED_MODULE
from fastft.patching.kind import Context, Kind
from fastft.patching.observe import observe
from fastft.patching.report import PatchReport, Row
from fastft.patching.sharded import ELSEWHERE, as_if_whole, exchanged
from fastft.proving.proof_cache import device_name, proof_of
from fastft.proving.prove import Proof, drawn_on_the_cpu
from fastft.swapping.out_of_memory import PatchMemoryError, is_out_of_memory
from fastft.swapping.swap import functions_of, is_fast, obstacle, slot_of, stock_class, swapped_in, uninstall
from fastft.swapping.walk import modules_of, names_of, parameters_of
from fastft_kernels.runtime.dispatch import has_bfloat16

RECORD = "_fastft_record"
NO_BFLOAT16 = (
    "this {} device has no bfloat16: what is in it takes torch's operators in place of kernels, more slowly; load the "
    "model with dtype=torch.float16 and train with fp16=True"
)


class StrictError(RuntimeError):
    """`patch(strict=True)` met modules that stay stock."""


@dataclass
class Outcome:
    """What became of one module under one kind: the kernel that it runs, or the reason why it is stock."""

    kind: str
    group: str
    name: str
    kernel: str = ""
    proof: Proof | None = None
    reason: str = ""

    def of(self, name: str) -> Outcome:
        """The same, of a module that is alike."""
        return Outcome(self.kind, self.group, name, self.kernel, self.proof, self.reason)


@dataclass
class Record:
    """What one patch knows, kept on the innermost base model: outcomes by (kind, module name), lines about the whole
    model."""

    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fallbacks: Counter = field(default_factory=Counter)
    cuda_graphs: bool | str = "auto"  # what was asked for

    def __deepcopy__(self, memo) -> Record:
        return Record(dict(self.outcomes), list(self.notes), Counter(self.fallbacks), self.cuda_graphs)

    def __reduce__(self):
        """A pickled model is a stock model: None comes back, and the standard library alone unpickles it."""
        return type(None), ()


def innermost(model: Any) -> Any:
    """The transformers model inside PEFT's, DDP's or torch.compile's wrapper: the one whose modules are looked at."""
    while True:
        if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            base = model.get_base_model()
        else:
            base = model.__dict__.get("_modules", {}).get(COMPILED_MODULE) or (
                model.module if type(model).__name__ in ("DistributedDataParallel", "DataParallel") else model
            )
        if base is model:
            return model
        model = base


def record_of(model: nn.Module) -> Record | None:
    """The record of a patched model; None for a stock one."""
    return innermost(model).__dict__.get(RECORD)


def apply_kinds(model: nn.Module, kinds: Sequence[Kind]) -> Record:
    """Swap on every module of `model` what a kind recognises and proves. Modules that carry a kind's swap already are
    left alone."""
    with ExitStack() as plain:  # a patch inside somebody's autocast or no_grad proves what it would prove outside
        plain.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            plain.enter_context(torch.autocast(device, enabled=False))
        new = record_of(model) is None
        try:
            return _apply(innermost(model), kinds, model)
        except BaseException as e:  # out of memory, an interrupt: a model is patched or stock, never half
            if new:
                undo(model)
            if is_out_of_memory(e):
                raise PatchMemoryError(_no_memory(e, new)) from e
            raise


def _no_memory(e: BaseException, new: bool) -> str:
    there = "the model is stock again" if new else "what was patched before stays patched"
    return (
        "patch: no memory was left for the proofs, which run on small copies where the model is "
        f"({str(e).splitlines()[0][:200]}); {there}: free "
        "some and patch again, or patch before the model is moved to the device"
    )


def _apply(base: nn.Module, kinds: Sequence[Kind], model: nn.Module) -> Record:
    record = base.__dict__[RECORD] = record_of(base) or Record()
    for kind in kinds:
        if (refresh := getattr(kind, "refresh", None)) is not None:
            refresh(base)
    wants = [w for kind in kinds if (w := getattr(kind, "wants", None)) is not None]
    with as_if_whole(base, model) as sharding:
        error: Exception | None = None
        try:
            with _uncounted(base):
                seen = observe(base, lambda fn: any(w(fn) for w in wants), not sharding)
            try:
                with drawn_on_the_cpu():
                    _swap_all(record, Context(base, seen, names_of(base), sharding=sharding), kinds)
            finally:
                seen.forget()
        except Exception as e:
            if not sharding:
                raise
            error = e
    if sharding:
        _agree(base, record, error)
    return record


def _agree(base: nn.Module, record: Record, error: Exception | None) -> None:
    """Among processes that share a model's parameters: a module that is stock on one of them is stock on all; an error
    on one is raised on all, as each would otherwise wait for the others. All come here, in the same order."""
    mine = None if error is not None else {k: "" if o.kernel else o.reason for k, o in record.outcomes.items()}
    everybody = exchanged(mine)
    if error is not None:
        raise error
    if None in everybody:
        raise RuntimeError(
            "patch: a proof could not be made on another process of this run; its message is there, and the model "
            "is stock on all of them"
        )
    modules = {n: m for m, n in names_of(base).items()}
    for (kind, name), outcome in record.outcomes.items():
        why = next((theirs[kind, name] for theirs in everybody if theirs.get((kind, name))), "")
        if outcome.kernel and why:
            uninstall(modules[name], kind)
            outcome.kernel, outcome.proof, outcome.reason = "", None, ELSEWHERE + why


def _swap_all(record: Record, context: Context, kinds: Sequence[Kind]) -> Record:
    seen, names = context.seen, context.names
    record.notes = [f"observation stopped early: {seen.error}"] if seen.error else []
    record.notes += devices_note(context.model) + context.sharding.left_out(context.model)
    twins = seen.twins.of
    for kind in kinds:
        for module in context.looked_at:
            if is_fast(module, kind.name):
                continue
            found = kind.recognise(module, context)
            alike = [module, *twins[module]] if module in twins else [module]
            if found is None:
                for m in alike if record.outcomes else ():
                    if (key := (kind.name, names[m])) in record.outcomes:
                        del record.outcomes[key]
                continue
            outcome = Outcome(kind.name, stock_class(module).__name__, names[module])
            why_not = found if isinstance(found, str) else obstacle(module)
            if isinstance(found, str) or why_not:
                outcome.reason = why_not
            else:
                outcome.proof = proof_of(kind.name, found.key, found.device, found.prove)
                if outcome.proof.ok:
                    for m in alike:
                        found.apply(m)
                    outcome.kernel, outcome.reason = found.kernel, found.note
                else:
                    outcome.reason = outcome.proof.reason
            for m in alike:
                record.outcomes[kind.name, names[m]] = outcome if m is module else outcome.of(names[m])
    return record


def devices_note(model: nn.Module) -> list[str]:
    """Lines where the parameters lie on several devices, are fetched for each call by Accelerate's hooks, or are in
    bfloat16 on a device that has none."""
    parameters = parameters_of(model)
    devices = dict.fromkeys([p.device for p in parameters])
    where = {str(d) for d in devices}
    hooked = "meta" in where and any(is_hooked(m) for m in modules_of(model))
    in_bfloat16 = dict.fromkeys(p.device for p in parameters if p.dtype == torch.bfloat16)
    lines = [NO_BFLOAT16.format(device_name(d)) for d in in_bfloat16 if not has_bfloat16(d.type, d.index)]
    if len(where) < 2 and not hooked:
        return lines
    places = sorted(where - {"meta"}) + ["offloaded"] * hooked
    lines += [
        f"on several devices ({', '.join(places)}): every module runs where it stands, and one linear layer at a time "
        "where its weight is fetched"
    ]
    if hooked and (lost := sum(p.requires_grad and p.device.type == "meta" for p in parameters)):
        lines.append(
            f"{lost} of the parameters that are to learn are offloaded, where a gradient has no place to go (stock's "
            "backward leaves it out, or "
            "fails): keep their layers on a device by another device_map, load in 4 bits, or train no adapter there"
        )
    return lines


def undo(model: nn.Module) -> None:
    """Restore every instance below `model`, and in its innermost base model, exactly."""
    base = innermost(model)
    for root in {id(model): model, id(base): base}.values():
        for module in swapped_in(root):
            uninstall(module)
    base.__dict__.pop(RECORD, None)


def build_report(model: nn.Module) -> PatchReport:
    """The report of a patched model. Raises ValueError for a stock one."""
    base = innermost(model)
    record = record_of(model)
    if record is None:
        raise ValueError(f"report: this {type(base).__name__} is not patched; call fastft.patch(model) first")
    groups: dict[tuple, list[Outcome]] = defaultdict(list)
    now = {n: m for m, n in names_of(base).items()}
    for o in record.outcomes.values():
        kernel, reason = o.kernel, o.reason
        if kernel and not ((module := now.get(o.name)) is not None and is_fast(module, o.kind)):
            there = "nothing" if module is None else f"a {stock_class(module).__name__}"
            kernel, reason = (
                "",
                f"replaced since the patch; {there} stands there: it joins at the next forward, or when patched again",
            )
        groups[o.kind, o.group, kernel, reason, o.proof if kernel else None].append(o)
    rows = [
        Row(
            kind,
            group,
            len(os),
            kernel,
            *((p.error, p.stock_error, p.dtype) if p else ()),
            reason=reason,
            example=os[0].name,
            device=p.device if p else "",
            sizes=p.sizes if p else "",
        )
        for (kind, group, kernel, reason, p), os in groups.items()
    ]
    rows.sort(key=lambda r: (not r.is_swapped,))
    return PatchReport(type(base).__name__, tuple(rows), fallbacks_of(model)(), tuple(record.notes))


def _counters(base: nn.Module) -> tuple[list[Counter], list[tuple[str, Any]]]:
    """What counts the calls that go the stock way: the record's and every module's counter, and rebound free functions
    (with their kind), which count for themselves, as one serves all modules of a class."""
    record = record_of(base)
    counters, functions = [] if record is None else [record.fallbacks], {}
    for module in swapped_in(base):
        if (slot := slot_of(module)) is not None:
            counters.append(slot.fallbacks)
            functions.update({id(f): (kind, f) for kind, (mixin, _) in slot.parts.items() for f in functions_of(mixin)})
    return counters, list(functions.values())


@contextmanager
def _uncounted(base: nn.Module) -> Iterator[None]:
    """An observation of a model that is patched already puts hooks everywhere: what goes the stock way because of them
    was nobody's step."""
    counters, functions = _counters(base)
    before, numbers = [dict(c) for c in counters], [f.fallbacks for _, f in functions]
    try:
        yield
    finally:
        for counter, was in zip(counters, before):
            counter.clear()
            counter.update(was)
        for (_, f), was in zip(functions, numbers):
            f.fallbacks = was


def fallbacks_of(model: nn.Module) -> Callable[[], dict[str, int]]:
    """A function that sums up the calls which went the stock way, up to when it is called. It keeps the counters, and
    not the model."""
    counters, functions = _counters(innermost(model))

    def total() -> dict[str, int]:
        calls: Counter = Counter()
        for counter in counters:
            calls.update(counter)
        for kind, f in functions:
            if f.fallbacks:
                calls[f"{kind}: {f.__name__} was called outside its proof"] += f.fallbacks
        return dict(calls)

    return total


def strict_check(report: PatchReport, kinds: Iterable[str] | None = None) -> None:
    """Raises StrictError where modules of `kinds` (None: of any) stay stock."""
    left = [r for r in report.stock if kinds is None or r.kind in kinds]
    if left:
        lines = "\n".join(f"  {r.kind}: {r.count} x {r.group} (such as {r.example}): {r.reason}" for r in left)
        raise StrictError(f"patch(strict=True): these stay stock:\n{lines}\nuse strict=False to train them as they are")
