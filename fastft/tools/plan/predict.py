"""Peak memory of one training step of one stack (fastft under a policy, or stock), at any batch and length, from runs
on fake tensors.

A deep model is many like layers, and memory is linear in their number at every moment of the code. So a model cut to a
few layers is run twice, with a period of layers more the second time, and every moment is extrapolated to the whole
depth; layers that differ (sliding and full attention in turn) are periods of several. A model whose layers show no
period is run whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from fastft.api import patch
from fastft.checkpointing.controller import control
from fastft.checkpointing.layer_stack import kind_of, stacks
from fastft.checkpointing.policy import Policy
from fastft.compat.torch_private import storage_id
from fastft.patching.patcher import innermost
from fastft.proving.prove import formula_alone
from fastft.tools.plan import fake as plan_fake
from fastft.tools.plan.gpus import BLOCK
from fastft.tools.plan.measure import TAGS, AllocationLedger, Phase, deeper
from fastft.tools.plan.optimizers import states
from fastft.tools.plan.ranks.strategies import RankSetup, Share, share_of
from fastft.tools.plan.step import finish, forward, head_as_on_cuda, trains_through_base, with_trl_head

ACTIVATIONS = TAGS.index("activations")
WINDOWS = [TAGS.index("gathered"), TAGS.index("communication")]
LONGEST_PERIOD, MOST_APART = 8, 4


@dataclass(frozen=True)
class TrainingSetup:
    """What is trained, and how. dtype: of the base; autocast: None or its dtype. adapters: the LoRA config; None trains
    everything. four_bit, fp8: how its frozen linear layers are stored. ranks: who shares the work; None: one
    process."""

    dtype: torch.dtype
    autocast: torch.dtype | None
    adapters: Any | None
    adapter_dtype: torch.dtype
    four_bit: bool
    optim: str
    accumulate: bool
    loss: str
    for_cuda: bool
    patched: bool = True
    fp8: bool = False
    ranks: RankSetup | None = None

    @property
    def fewest(self) -> int:
        """Layers of a kind that have all that many have: the first one is like no other, and where parameters are
        gathered, one waits for the layer before and one for the layer after."""
        return 3 if self.is_wrapped else 2

    @property
    def storage(self) -> torch.dtype:
        """What 4-bit values are stored as: FSDP2 shards floating-point weights alone."""
        return self.dtype if self.ranks is not None and self.ranks.strategy == "fsdp2" else torch.uint8

    @property
    def is_wrapped(self) -> bool:
        """Does the strategy change the modules, so that what is swapped is found out once it has?"""
        return self.ranks is not None and self.ranks.wraps


@dataclass(frozen=True)
class StepPeakMemory:
    """Bytes at the fullest moment of a step. parts: by what they are for; phase: when."""

    parts: dict[str, int]
    phase: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class TracedStep:
    """Bytes that live through a whole step, what its phases allocate, and the bytes that its collectives gather or
    sum."""

    static: dict[str, int]
    phases: list[Phase]
    moved: dict[str, int] = field(default_factory=dict)


@dataclass
class PlannedModel:
    """A model to plan for. depth: its layers; period: how many of them repeat; counts that are run are smaller."""

    config: PretrainedConfig
    setting: TrainingSetup
    model: nn.Module
    pool: list[nn.Module]
    container: nn.ModuleList | None
    depth: int
    period: int | None
    fake: plan_fake.FakeRun
    runs: dict[tuple, TracedStep] = field(default_factory=dict)
    has_squares: bool | None = None  # whether memory grows with the square of a row's length, once `search` has asked
    recomputation: str = "lean"  # or "full": how all layers are recomputed, where all are
    on_run: Callable[[str], None] = lambda what: None  # is told of each run before it
    others: dict[RankSetup | None, PlannedModel] = field(default_factory=dict)  # on other numbers of ranks
    apart: int = 0  # how many layers at the beginning are of another kind, and repeat nowhere

    def on(self, ranks: RankSetup | None) -> PlannedModel:
        """This model on as many ranks; its runs are remembered too."""
        if ranks == self.setting.ranks:
            return self
        if ranks not in self.others:
            setting = replace(self.setting, ranks=ranks)
            self.others[ranks] = replace(self, setting=setting, runs={}, has_squares=None)
        return self.others[ranks]

    def peak(self, layers: tuple[int, int], rows: int, tokens: int, offloaded: int = 0) -> StepPeakMemory:
        """The fullest moment of a step. layers: how many are recomputed, and how many kept (one of them 0 for stock);
        offloaded: how many of the recomputed ones have their input on the host."""
        whole = self.whole(layers, rows, tokens, offloaded)
        return max(_peaks(whole), key=lambda p: p.total)

    def peaks(self, layers: tuple[int, int], rows: int, tokens: int, offloaded: int = 0) -> list[StepPeakMemory]:
        """The fullest moment of each phase."""
        return _peaks(self.whole(layers, rows, tokens, offloaded))

    def shallow(self, layers: tuple[int, int], rows: int, tokens: int) -> list[StepPeakMemory]:
        """The fullest moment of each phase, of a model of few layers."""
        return _peaks(self._run(self._less(layers), rows, tokens))

    def whole(self, layers: tuple[int, int], rows: int, tokens: int, offloaded: int = 0) -> TracedStep:
        """The run of the whole model, extrapolated from those of a few layers."""
        small = self._less(layers)
        base, longs = self._run(small, rows, tokens), []
        static, moved = dict(base.static), dict(base.moved)
        for i in range(2):
            steps = (layers[i] - small[i]) // (self.period or 1)
            if not steps:
                continue
            further = (small[0] + (self.period or 1) * (i == 0), small[1] + (self.period or 1) * (i == 1))
            run = self._run(further, rows, tokens)
            longs.append((steps, run.phases))
            static = {k: v + steps * (run.static[k] - base.static[k]) for k, v in static.items()}
            moved = {k: v + steps * (run.moved[k] - base.moved[k]) for k, v in moved.items()}
        return TracedStep(static, deeper(base.phases, longs, _Growth(offloaded / max(layers[0], 1))), moved)

    def kept(self, layers: tuple[int, int], rows: int, tokens: int) -> float:
        """Bytes that a further layer adds to what lives between forward and backward: of a recomputed one, or if there
        is none, a kept one."""
        small, p = self._less(layers), self.period or 1
        if self.period is None:
            return self._run(layers, rows, tokens).phases[0].live[-1, ACTIVATIONS] / max(self.depth, 1)
        further = (small[0] + p, small[1]) if layers[0] else (small[0], small[1] + p)
        a, b = (self._run(n, rows, tokens).phases[0].live[-1, ACTIVATIONS] for n in (small, further))
        return (b - a) / p

    def _less(self, layers: tuple[int, int]) -> tuple[int, int]:
        """The smallest numbers of layers that repeat as these do; the first ones, of another kind, stay. Where fastft
        recomputes, the first layer, whose input is kept anyway, is like no other: then there are two."""
        p, before = self.period, 0
        if p is None:
            return layers
        alike = not self.setting.is_wrapped and not (self.setting.patched and layers[0])
        least, one = [], p if alike else max(self.setting.fewest, p)
        for count in layers:
            fewest = one + max(0, self.apart - before)
            before += count
            while count - p >= fewest:
                count -= p
            least.append(count)
        return least[0], least[1]

    def _run(self, layers: tuple[int, int], rows: int, tokens: int) -> TracedStep:
        key = (layers, rows, tokens)
        if key not in self.runs:
            stack = "fastft" if self.setting.patched else "stock"
            self.on_run(f"{stack}: {rows} x {tokens} tokens, {layers[0]} layers recomputed, {layers[1]} kept")
            s = self.setting
            self._cut(sum(layers))
            quantisation = plan_fake.quantisation_tensors(self.model)
            with share_of(self.model, s.ranks, s.autocast, self.fake) as share:
                if s.is_wrapped and s.patched:  # as it is then: what is gathered together is swapped together
                    with formula_alone():
                        patch(self.model)
                with self.fake():
                    self._prepare(layers)
                    self.runs[key] = self._step(share, quantisation, rows, tokens)
        return self.runs[key]

    def _cut(self, depth: int) -> None:
        if self.container is not None:
            self.container._modules = {str(i): m for i, m in enumerate(self.pool[:depth])}

    def _prepare(self, layers: tuple[int, int]) -> None:
        base = innermost(self.model)
        if not self.setting.patched:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}) if layers[
                0
            ] else _store(base)
        elif not layers[1]:
            control(base, Policy(self.recomputation))
        else:
            control(base, Policy("layers", layers=layers[0]) if layers[0] else Policy("none"))

    def _step(self, share: Share, quantisation: list[torch.Tensor], rows: int, tokens: int) -> TracedStep:
        """The second step of a run, and the last of its accumulated batches: the optimizer's state is there, and so may
        gradients be."""
        s, model = self.setting, self.model
        with contextlib.ExitStack() as context:
            if s.for_cuda:
                context.enter_context(_as_on_cuda(innermost(model)))
            batch = plan_fake.batch(self.config, rows, tokens)
            learning = [p for p in model.parameters() if p.requires_grad]
            step, kept = states(model, s.optim, s.for_cuda)
            share.rehearse()
            held = [t.untyped_storage() for t in share.parts((*model.parameters(), *model.buffers(), *quantisation))]
            ledger = AllocationLedger(BLOCK if s.for_cuda else 1, s.for_cuda, set(map(storage_id, held)))
            with ledger:
                for t in share.parts(kept):
                    ledger.adopt(t, "optimizer")
                for t in batch.values():
                    ledger.adopt(t, "activations")
                if s.accumulate:
                    for p in learning:
                        p.grad = torch.empty_like(p)
                    ledger.tag(share.parts(p.grad for p in learning if p.grad is not None), "gradients")
                ledger.phase("forward")
                loss = forward(model, batch, s.loss, s.autocast)
                ledger.tag(None, "activations")
                ledger.phase("backward")
                loss.backward()
                share.summed(ledger)
                ledger.tag(share.parts(p.grad for p in learning if p.grad is not None), "gradients")
                ledger.phase("optimizer")
                finish(model, step)
            for p in learning:
                p.grad = None
            static = _static(share, quantisation, BLOCK if s.for_cuda else 1)
            return TracedStep(static, ledger.phases(), ledger.moved)


def _peaks(run: TracedStep) -> list[StepPeakMemory]:
    found = []
    for phase in run.phases:
        moment = phase.live[phase.live.sum(1).argmax()] if len(phase.live) else np.zeros(len(TAGS))
        here = {t: round(v) + run.static.get(t, 0) for t, v in zip(TAGS, moment)}
        found.append(StepPeakMemory(run.static | here, phase.name))
    return found


@dataclass(frozen=True)
class _Growth:
    """What a further layer adds to a step's memory, without the part of its activations that is on the host; and
    without what is gathered and sent: of the layers around the one that runs, as many as there are in a short run."""

    on_host: float

    def __call__(self, growth: np.ndarray) -> np.ndarray:
        growth = growth.copy()
        growth[:, ACTIVATIONS] *= 1 - self.on_host
        growth[:, WINDOWS] = 0
        return growth


@contextlib.contextmanager
def _as_on_cuda(base: nn.Module) -> Iterator[None]:
    from fastft_kernels.runtime.dispatch import planned_for_cuda

    with planned_for_cuda(), head_as_on_cuda(base):
        yield


def _store(base: Any) -> None:
    base.gradient_checkpointing_disable()


def _static(share: Share, quantisation: list[torch.Tensor], rounding: int) -> dict[str, int]:
    """Bytes that live through the whole run, each storage once."""
    seen: set[int] = set()

    def size(tensors) -> int:
        total = 0
        for t in share.parts(tensors):
            storage = t.untyped_storage()
            if (key := storage_id(storage)) not in seen:
                seen.add(key)
                total += -(-storage.nbytes() // rounding) * rounding
        return total

    lora = hasattr(share.model, "peft_config")
    parameters = list(share.model.parameters())
    return {
        "adapters": size(p for p in parameters if lora and p.requires_grad),
        "quantisation": size(quantisation),
        "weights": size(parameters),
        "buffers": size(share.model.buffers()),
        "communication": size(share.buffers),
    }


def subject(
    config: PretrainedConfig,
    setting: TrainingSetup,
    trust_remote_code: bool = False,
    on_run: Callable[[str], None] = lambda what: None,
) -> PlannedModel:
    """The model of `config`, cut where its layers repeat, with adapters, patched, and made of fake tensors. on_run: is
    told in words what comes next, for a progress line."""
    on_run("building the model")
    model = plan_fake.build(
        config,
        setting.dtype,
        four_bit=setting.four_bit,
        storage=setting.storage,
        fp8=setting.fp8,
        trust_remote_code=trust_remote_code,
    )
    pool, container, period, apart = _repeating(model)
    depth = len(pool)
    if period is not None:
        pool = pool[: min(depth, apart + 2 * (2 * period + max(2, period)))]
        assert container is not None
        container._modules = {str(i): m for i, m in enumerate(pool)}
    if setting.loss == "trl":
        with_trl_head(model)
    if setting.adapters is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            model = get_peft_model(
                cast(Any, model), setting.adapters, autocast_adapter_dtype=False, low_cpu_mem_usage=True
            )
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(setting.adapter_dtype)
    model.train()
    trains_through_base(model)
    if setting.patched and not setting.is_wrapped:
        with formula_alone():
            patch(model)
    fake = plan_fake.FakeRun()
    with fake():
        plan_fake.to_fake(model)
    return PlannedModel(config, setting, model, pool, container, depth, period, fake, on_run=on_run, apart=apart)


def _repeating(model: nn.Module) -> tuple[list[nn.Module], nn.ModuleList | None, int | None, int]:
    """(the layers of the largest stack, the list that holds them, the period in which they repeat or None, how many
    before that repeat nowhere: the dense layers of a mixture)."""
    found = stacks(model)
    if not found:
        return [], None, None, 0
    layers = max(found, key=lambda s: s.share).alive()
    container = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and list(m) == layers), None)
    if container is None:
        return layers, None, None, 0
    signatures = [_signature(m) for m in layers]
    for apart in range(MOST_APART + 1):
        rest = signatures[apart:]
        for p in range(1, LONGEST_PERIOD + 1):
            if len(rest) > 2 * max(2, p) + p and rest[p:] == rest[:-p]:
                return layers, container, p, apart
    return layers, container, None, 0


def _signature(layer: nn.Module) -> tuple:
    """Layers with the same do the same."""
    plain = (bool, int, float, str, type(None))
    settings = [
        (name, k, v)
        for name, m in layer.named_modules()
        for k, v in vars(m).items()
        if isinstance(v, plain) and k not in ("layer_idx", "layer_id", "training")
    ]
    return kind_of(layer), tuple(settings)
