"""`fastft plan`: the memory that training will take, before a GPU or the weights are there.

The real patched model runs a real step on fake tensors (`predict`), from its configuration alone; stock runs
beside it. From a few such runs follow the largest batch and the longest sequence that fit a GPU, and what the
activation policy "auto" would choose there."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from fastft.checkpointing.policy import parse
from fastft.checkpointing.split import choose
from fastft.checkpointing.stack_forward import HEAD_BYTES, WORKSPACE
from fastft.errors import DtypeError, ModelNotFoundError, PlanError
from fastft.experts.structure import wide_experts
from fastft.loading.checkpoint import adapter_config
from fastft.parsing import parse_dtype
from fastft.tools.plan.gpus import Gpu, find, known, several
from fastft.tools.plan.predict import PlannedModel, TrainingSetup, subject
from fastft.tools.plan.ranks.needed import gpus_needed, sent
from fastft.tools.plan.ranks.strategies import STRATEGIES, RankSetup
from fastft.tools.plan.ranks.strategies import notes as ranks_notes
from fastft.tools.plan.result import UNMEASURED, Plan, PlanLine
from fastft.tools.plan.search import Limits, search
from fastft.tools.plan.step import LOSSES

MOST_TOKENS = 2**26  # of one step: its token ids are real, 0.5 GiB


def plan(
    model: str | os.PathLike | PretrainedConfig,
    *,
    gpu: str | None = None,
    gpus: str | None = None,
    strategy: str | None = None,
    seq: int = 2048,
    batch: int = 4,
    r: int = 16,
    load_in_4bit: bool = False,
    load_in_fp8: bool = False,
    full: bool = False,
    dtype: torch.dtype | str = "auto",
    optim: str = "adamw_torch_fused",
    accumulate: int = 1,
    policy: str | int = "auto",
    loss: str | None = None,
    peft_config: Any = None,
    adapter_dtype: torch.dtype | str | None = None,
    device: str = "cuda",
    stock: bool = True,
    limits: bool = True,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Plan:
    """Predict the peak memory of a training step, nothing padded.

    Args:
        model: a checkpoint's or configuration's name or folder, an adapter's folder (its base is planned for, with the
            adapter's own settings), or a config.
        gpu: a card ("T4", "4090", "H100"), a size ("16GiB"), "this" for this machine's; None: no limit, and no search.
        gpus: several of one kind in its place ("4x24GiB", "8xH100"), each with a process of its own: the plan is one
            rank's, with what its collectives move.
        strategy: how the processes share the work: "ddp" or "fsdp2" (the default), as accelerate sets them up.
        seq, batch: tokens of a row, rows on each device.
        accumulate: gradient_accumulation_steps.
        r: LoRA's rank, on all linears but the head.
        peft_config: any other PEFT config.
        full: no adapter, everything is trained.
        load_in_4bit: NF4 with double quantisation.
        load_in_fp8: FP8 with a scale for each row, and its products in FP8. Stock has nothing like it, its lines
            are those of weights in `dtype`.
        dtype: of the base; "auto" the checkpoint's, float16 on a card without bfloat16. The step runs under autocast to
            that dtype.
        adapter_dtype: None: float32, and bfloat16 on a 4-bit base (both as TRL does it) unless that computes in
            float16.
        optim: as in TrainingArguments: adamw_torch, adamw_torch_fused, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit.
        policy: of `fastft.patch(activation_policy=...)`.
        loss: "trl", the fused head of TRL's trainers (default where TRL is installed), or "model", the model's own
            loss.
        device: "cpu" predicts for the CPU's own code, without an allocator's rounding.
        stock: also TRL's default (every layer checkpointed) and stock without checkpointing.
        limits: also the largest batch and longest row.
        trust_remote_code: as transformers takes it.
        progress: is told in words what is run next.

    Returns:
        The plan: a line of bytes for each way of training; `print` shows its table.

    Raises:
        ModelNotFoundError, DtypeError, PolicyError: as `fastft.FastModel`.
        PlanError: something that a plan does not know, or a model that needs its values.
    """
    notes = []
    if not isinstance(model, PretrainedConfig) and (adapter := _adapter(os.fspath(model))) is not None:
        base_name = str(adapter.base_model_name_or_path)
        notes.append(f"planned for {base_name}, the base of the adapter in {os.fspath(model)}")
        model, peft_config = base_name, adapter if peft_config is None and not full else peft_config
    config = model if isinstance(model, PretrainedConfig) else _config(os.fspath(model), trust_remote_code)
    card, ranks = _cards(gpu, gpus, strategy)
    loss = loss or ("trl" if importlib.util.find_spec("trl") is not None else "model")
    for what, value, known_values in (("loss", loss, LOSSES), ("device", device, ("cuda", "cpu"))):
        if value not in known_values:
            raise PlanError(f"{what}={value!r}: want one of {known_values}")
    if min(seq, batch, accumulate, r) < 1:
        raise PlanError(f"seq={seq}, batch={batch}, accumulate={accumulate}, r={r}: want numbers from 1")
    if seq * batch > MOST_TOKENS:
        raise PlanError(
            f"batch={batch}, seq={seq}: {seq * batch:,} tokens in one step, want at most {MOST_TOKENS:,}: plan for "
            "fewer, a largest batch that is searched (gpu=...) may still be more"
        )
    if load_in_4bit and load_in_fp8:
        raise PlanError("load_in_4bit and load_in_fp8 were both given: choose one")
    if full and (load_in_4bit or load_in_fp8):
        flag, kept = ("load_in_4bit", "4 bits") if load_in_4bit else ("load_in_fp8", "FP8")
        raise PlanError(f"full and {flag} were both given: weights in {kept} cannot be trained, leave one out")
    base = _dtype(dtype, config, card)
    if ranks is not None:
        if load_in_fp8:
            raise PlanError("load_in_fp8 is not planned on several GPUs: leave it out, or plan for one (gpu=...)")
        notes += ranks_notes(ranks, base, load_in_4bit, full, accumulate)
    adapters = None if full else peft_config or lora(r)
    # SFTTrainer casts the adapters of a quantised base to bfloat16, of which float16's gradient scaler takes none
    on_4bit = torch.bfloat16 if loss == "trl" and base != torch.float16 else torch.float32
    usual = on_4bit if load_in_4bit else torch.float32
    of_adapters = usual if adapter_dtype is None else _dtype(adapter_dtype, config, card)
    setting = TrainingSetup(
        dtype=base,
        autocast=None if base == torch.float32 else base,
        adapters=adapters,
        adapter_dtype=of_adapters,
        four_bit=load_in_4bit,
        optim=optim,
        accumulate=accumulate > 1,
        loss=loss,
        for_cuda=device == "cuda",
        fp8=load_in_fp8,
        ranks=ranks,
    )
    ours = subject(config, setting, trust_remote_code, progress)
    work = _Work(ours, batch, seq, card, limits and card is not None, accumulate)
    lines = work.fastft(policy)
    if stock:
        work = replace(
            work, subject=subject(config, replace(setting, patched=False, fp8=False), trust_remote_code, progress)
        )
        lines += work.stock()
    name = config.name_or_path if isinstance(model, PretrainedConfig) else os.fspath(model)
    named = lambda d: str(d).removeprefix("torch.")
    trained = "full fine-tuning" if full else f"LoRA r={getattr(adapters, 'r', '?')} in {named(of_adapters)}"
    what = f"{'NF4' if load_in_4bit else 'FP8' if load_in_fp8 else named(base)}, {trained}, {optim}, {loss}'s loss"
    what += f", {accumulate} accumulated" if accumulate > 1 else ""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and seq > positions:
        notes.append(f"rows of {seq:,} tokens are longer than the {positions:,} positions that the model was built for")
    elif positions is not None and max((x.longest or 0 for x in lines), default=0) > positions:
        notes.append(f"the longest rows that fit are beyond the {positions:,} positions that the model was built for")
    if setting.dtype == torch.float16 and dtype == "auto" and card is not None and not card.has_bfloat16:
        notes.append(f"in float16: a {card.name} has no bfloat16")
    notes += [UNMEASURED] if device == "cuda" else []
    if load_in_fp8 and stock:
        notes.append(f"stock has no FP8 like it: its lines are those of weights in {named(base)}")
    if load_in_4bit and (left := wide_experts(ours.model)):
        notes.append(left)
    title = name or type(config).__name__
    found = Plan(title, what, batch, seq, ours.depth, card, tuple(lines), tuple(notes))
    return found if ranks is None else replace(found, gpus=ranks.count, strategy=ranks.strategy)


@dataclass(frozen=True)
class _Work:
    """Plans the lines of one subject."""

    subject: PlannedModel
    batch: int
    seq: int
    gpu: Gpu | None
    limits: bool
    accumulate: int = 1

    def fastft(self, policy: str | int) -> list[PlanLine]:
        """The policy asked for, then the others."""
        depth, asked = self.subject.depth, parse(policy)
        ways = {"none": (0, depth, 0), "lean": (depth, 0, 0), "offload": (depth, 0, depth)}
        if not depth:
            return [self._line("fastft", "none (no layers to checkpoint)", (0, 0, 0))]
        lines = {n: self._line("fastft", n, way) for n, way in ways.items()}
        if asked.mode in ("none", "lean", "offload"):
            first = lines.pop(asked.mode)
        elif asked.mode == "trainer":  # TRL's checkpoints every layer by default
            first = replace(lines["lean"], policy="trainer (which checkpoints every layer)")
        elif asked.mode == "full":
            whole = replace(self.subject, recomputation="full", runs={}, has_squares=None)
            first = replace(self, subject=whole)._line("fastft", "full", (depth, 0, 0))
        elif asked.mode == "layers":
            n = min(asked.layers or 0, depth)
            first = self._line("fastft", f"{n} layers", (n, depth - n, 0))
        else:
            first = self._auto(lines, asked.budget)
        return [first, *lines.values()]

    def _auto(self, lines: dict[str, PlanLine], budget: int | None) -> PlanLine:
        s, depth = self.subject, self.subject.depth
        usable = budget if budget is not None else None if self.gpu is None else self.gpu.usable
        if usable is None:
            return replace(lines["none"], policy="auto (no limit)")
        kept, checkpoint = (s.kept(n, self.batch, self.seq) for n in ((0, depth), (depth, 0)))
        parts = lines["none"].peak.parts
        held = sum(v for k, v in parts.items() if k not in ("temporary", "activations", "gradients"))
        numel = checkpoint / s.setting.dtype.itemsize
        gradients = sum(p.numel() * p.element_size() for p in s.model.parameters() if p.requires_grad)
        gradients //= 1 if s.setting.ranks is None else s.setting.ranks.gradients_over
        reserve = WORKSPACE + HEAD_BYTES * numel + kept + gradients
        split = choose([int(kept)] * depth, [int(checkpoint)] * depth, usable - held, int(reserve))
        line = self._line(
            "fastft", "auto", (split.recomputed, depth - split.recomputed, split.offloaded), search_too=False
        )
        best = lambda name: max((v for x in lines.values() if (v := getattr(x, name)) is not None), default=None)
        return replace(line, largest_batch=best("largest_batch"), longest=best("longest"))

    def stock(self) -> list[PlanLine]:
        depth = self.subject.depth
        full = [self._line("stock", "every layer checkpointed (TRL's default)", (depth, 0, 0))] if depth else []
        return [*full, self._line("stock", "no checkpointing", (0, depth, 0))]

    def _line(self, stack: str, policy: str, way: tuple[int, int, int], search_too: bool = True) -> PlanLine:
        recomputed, kept, offloaded = way
        s, shape = self.subject, (self.batch, self.seq)
        peak = s.peak((recomputed, kept), *shape, offloaded)
        taken = lambda gpu: peak.total + (gpu.cublas if self.subject.setting.for_cuda else 0)
        fits = None if self.gpu is None else taken(self.gpu) <= self.gpu.usable
        smallest = next(
            (
                g.name
                for g in known()
                if taken(g) <= g.usable and (g.has_bfloat16 or self.subject.setting.dtype != torch.bfloat16)
            ),
            None,
        )
        found = Limits()
        if self.limits and search_too and self.gpu is not None:
            found = search(
                self.subject, (recomputed, kept), offloaded, self.gpu.usable - self.gpu.cublas, self.batch, self.seq
            )
        line = PlanLine(stack, policy, recomputed, offloaded, peak, fits, found.batch, found.tokens, smallest)
        if self.gpu is None or s.setting.ranks is None:
            return line
        moved = s.whole((recomputed, kept), *shape, offloaded).moved
        room = self.gpu.usable - self.gpu.cublas
        needed = gpus_needed(s, (recomputed, kept), *shape, offloaded, room)
        return replace(line, moved=sent(moved, s.setting.ranks.count, self.accumulate), gpus_needed=needed)


def _cards(gpu: str | None, gpus: str | None, strategy: str | None) -> tuple[Gpu | None, RankSetup | None]:
    """The card that is planned for, and who shares the work."""
    if strategy is not None and strategy not in STRATEGIES:
        raise PlanError(
            f"strategy={strategy!r}: want one of {', '.join(STRATEGIES)} (DeepSpeed's stages are not planned)"
        )
    if gpus is None:
        if strategy is not None:
            raise PlanError(f"strategy={strategy!r} is for several GPUs: pass gpus='4x24GiB', or leave it out")
        return None if gpu is None else find(gpu), None
    if gpu is not None:
        raise PlanError(f"gpu={gpu!r} and gpus={gpus!r} were both given: leave one out")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise PlanError(f"gpus={gpus!r}: a process group is there already; plan in a process that no launcher started")
    count, card = several(gpus)
    return card, RankSetup(strategy or "fsdp2", count)


def _config(name: str, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    if not os.path.exists(name) and (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1):
        raise ModelNotFoundError(f"no configuration at {name!r}: there is no such folder; pass one with a config.json")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelNotFoundError(f"no configuration at {name!r}: {first}") from e


def _adapter(folder: str) -> Any:
    """The PEFT config of an adapter's folder; None for what is none."""
    found = adapter_config(folder, {}) if os.path.isdir(folder) else None
    if found is not None:
        found.inference_mode = False  # as saved; here it trains
    return found


def lora(r: int, modules: str | list[str] = "all-linear", parameters: list[str] | None = None) -> Any:
    """The LoRA config that is planned with. modules, parameters: PEFT's target_modules and target_parameters."""
    from peft import LoraConfig

    return LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=modules, target_parameters=parameters, task_type="CAUSAL_LM"
    )


def _dtype(dtype: torch.dtype | str, config: PretrainedConfig, gpu: Gpu | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        found = parse_dtype(dtype)
        if found is None:
            raise DtypeError(f'dtype={dtype!r} is no floating-point dtype: pass bfloat16, float16, float32 or "auto"')
        return found
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    stored = parse_dtype(stored) if isinstance(stored, str) else stored
    stored = stored or torch.bfloat16
    return torch.float16 if stored == torch.bfloat16 and gpu is not None and not gpu.has_bfloat16 else stored
