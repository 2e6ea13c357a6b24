"""A new adapter on a model, or a saved one loaded onto its base, by PEFT."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fastft.errors import AdapterError, CheckpointError, TargetModulesError
from fastft.loading.checkpoint import HUB_KEYS
from fastft.loading.mistakes import faulty_weights, folder_of

TASK_OF_CLASS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def default_lora_config() -> Any:
    """LoRA on every linear layer but the head, r=16, alpha=32 (TRL's own defaults for both), no dropout."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def _task_of(model: Any) -> str | None:
    for ending, task in TASK_OF_CLASS.items():
        if type(model).__name__.endswith(ending):
            return task
    if model.can_generate():
        return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return None


def attach_adapter(model: Any, peft_config: Any, revision: str | None) -> nn.Module:
    """A new adapter by `peft_config` on the model. Raises TargetModulesError, AdapterError."""
    from peft import get_peft_model

    if getattr(peft_config, "task_type", None) is None:
        peft_config = copy.deepcopy(peft_config)
        peft_config.task_type = _task_of(model)
    given: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        return get_peft_model(model, peft_config, **given)
    except ImportError as e:
        if "torchao" not in str(e):
            raise
        raise AdapterError(
            f"PEFT refuses the torchao that is installed ({str(e).splitlines()[0]}): pip install -U torchao, or "
            "pip uninstall torchao (fastft does not need it)"
        ) from e
    except ValueError as e:
        targets = getattr(peft_config, "target_modules", None)
        if targets and not _matches(model, targets):
            raise TargetModulesError(
                f"target_modules={_shown(targets)} match nothing in this {type(model).__name__}: "
                f'its linear layers are named {", ".join(_linear_names(model))}; or pass target_modules="all-linear"'
            ) from e
        raise


def _matches(model: Any, targets: Any) -> bool:
    """Whether any module's name would be a target, by PEFT's rule: a full match of a pattern, or an ending of the
    dotted name."""
    import re

    names = [n for n, _ in model.named_modules()]
    if isinstance(targets, str):
        return targets == "all-linear" or any(re.fullmatch(targets, n) for n in names)
    return any(n == t or n.endswith(f".{t}") for t in targets for n in names)


def _linear_names(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    return sorted(
        {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    )


def _shown(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else repr(sorted(targets))


def load_adapter(base: Any, name: str, kwargs: dict, is_trainable: bool) -> nn.Module:
    """The adapter that is saved at `name`, on `base`. Raises AdapterError, CheckpointError."""
    from peft import PeftModel

    places = {k: kwargs[k] for k in (*HUB_KEYS, "revision", "subfolder") if k in kwargs}
    if reason := faulty_weights(folder_of(name, places), "adapter_model"):
        raise CheckpointError(reason)
    try:
        return PeftModel.from_pretrained(base, name, is_trainable=is_trainable, **places)
    except RuntimeError as e:
        if "size mismatch" not in str(e):
            raise
        first = next(line.strip() for line in str(e).splitlines() if "size mismatch" in line)
        raise AdapterError(
            f"the adapter at {name} does not fit its base {base.name_or_path!r} ({first}): "
            "load the base it was trained on (for a classifier, with its num_labels)"
        ) from e
