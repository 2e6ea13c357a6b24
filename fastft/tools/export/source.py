"""What is exported: a base, an adapter on it or none, the tokenizer, and the result's tensors one by one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastft.errors import ExportError, ModelNotFoundError
from fastft.tools.merge.adapter_parts import AdapterWeights, read_adapter
from fastft.tools.merge.base import base_folder, read_json
from fastft.tools.merge.merge import check_base
from fastft.tools.merge.merge_plan import MergePlan, make_plan
from fastft.tools.merge.precision import stored_in_four_bits, take_precision, trained_in

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclass
class ExportSource:
    """name: of the model, as a server may show it. config: the result's. checked: whether the base could be held
    against the one that the adapter names. trained: (4-bit type, double quantisation) that the adapter was trained on,
    None for 16 bits or where nothing says it; the plan says what is taken."""

    name: str
    adapter: Path | None
    parts: AdapterWeights
    base: Path
    plan: MergePlan
    checked: bool
    trained: tuple[str, bool] | None = None

    @property
    def config(self) -> Any:
        """transformers' configuration of the result."""
        from transformers import AutoConfig

        config = copy.deepcopy(AutoConfig.from_pretrained(self.base))
        if self.plan.vocab is not None:
            config.get_text_config().vocab_size = self.plan.vocab
        if self.plan.is_untied:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        return config

    @property
    def base_name(self) -> str:
        """As the adapter names it."""
        return self.parts.config.base_model_name_or_path or str(self.base)

    @property
    def precision(self) -> str:
        """What the adapter is merged onto, in words."""
        if self.plan.rounded is not None:
            return f"the base in {self.plan.rounded[1]}"
        return "the base in 4 bits, expanded" if stored_in_four_bits(self.plan) else "the base as it is stored"

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's where it has one, as a tokenizer that was changed in training is saved beside it."""
        own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return self.adapter if own and self.adapter is not None else self.base

    def tokenizer(self) -> Any:
        """Loaded as a user loads it. ModelNotFoundError without one."""
        from transformers import AutoTokenizer

        folder = self.tokenizer_folder
        none = f"export: want a tokenizer in {str(folder)!r}, got none: save it there with save_pretrained"
        if not any((folder / name).is_file() for name in TOKENIZERS):  # transformers makes an empty one
            raise ModelNotFoundError(none)
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as e:
            raise ModelNotFoundError(none) from e

    def generation(self) -> dict[str, Any]:
        """generation_config.json, from the adapter's folder or the base's; empty without one."""
        for folder in (self.adapter, self.base):
            if folder is not None and (path := folder / "generation_config.json").is_file():
                return read_json(path)
        return {}

    def stops(self, tokenizer: Any) -> list[int]:
        """Ids that end an answer."""
        named = self.generation().get("eos_token_id")
        every = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
        return list(dict.fromkeys(t for t in every if t is not None))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the result's tensors, by name, in the order of `tensors`. ExportError for one that the model's class does
        not have."""
        from transformers import AutoModelForCausalLM

        config = self.config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        known = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        names = self._names(model)
        if missing := [n for n in names if n not in known]:
            raise ExportError(
                f"export: the base has {missing[0]!r}, which {type(model).__name__} does not: use --to merged"
            )
        return {n: known[n] for n in names}

    def _names(self, model: Any) -> list[str]:
        tied = getattr(model.config, "tie_word_embeddings", False)
        out = model.get_output_embeddings()
        drop = {f"{n}.weight" for n, m in model.named_modules() if m is out} if tied else set()
        return [n for n in self.plan.names() if n not in drop]

    def tensors(self, names: set[str], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the result, of those in `names`, one at a time."""
        for path in self.plan.files:
            for name, t in self.plan.tensors(path, dtype):
                if name in names:
                    yield name, t
                del t


def is_adapter(path: Path) -> bool:
    """Is it an adapter's folder (else a model's, or a name)?"""
    return (path.is_dir() and not (path / "config.json").is_file()) or (path / "adapter_config.json").is_file()


def find_source(
    source: str | Path, base: str | None = None, other_base: bool = False, precision: str = "trained"
) -> ExportSource:
    """An adapter's folder, or a model's folder or name; `precision`: one of merge.precision's CHOICES.

    Raises AdapterError, ModelNotFoundError."""
    from peft import LoraConfig

    path = Path(source)
    if is_adapter(path):
        parts = read_adapter(path)
        where = base_folder(base or parts.config.base_model_name_or_path, parts.config.revision)
        plan = make_plan(where, parts)
        checked = check_base(path, parts, where) if not other_base else False
        trained = trained_in(path, parts.config.base_model_name_or_path, parts.config.revision)
        plan = take_precision(plan, where, precision, trained)
        return ExportSource(path.resolve().name, path, parts, where, plan, checked, trained)
    if base is not None:
        raise ExportError(f"export: {str(source)!r} is no adapter's folder, so that --base says nothing; leave it out")
    where = base_folder(str(source), None)
    parts = AdapterWeights(LoraConfig())
    return ExportSource(where.resolve().name, None, parts, where, make_plan(where, parts), True)


def write_json(path: Path, found: Any) -> None:
    """Indented, for people."""
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
