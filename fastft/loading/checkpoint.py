"""Which checkpoint a name or folder means: the adapter in it, its base, its configuration and class. What is missing is
said in one line."""

from __future__ import annotations

import os
from typing import Any

from fastft.errors import AdapterError, CheckpointError, ModelNotFoundError, SequenceLengthError
from fastft.loading.mistakes import faulty_json

# where to look: as good for an adapter as for its base
HUB_KEYS = ("token", "cache_dir", "force_download", "local_files_only", "proxies")
SECONDS_TO_ANSWER = 5.0  # of the Hub, before it counts as out of reach
AUTO_OF_TASK = {
    "CAUSAL_LM": None,  # a causal or an image-text model: the checkpoint says which
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def is_path(name: str) -> bool:
    """Whether the text can only be a path: the Hub's names have at most one slash and begin with a letter or digit."""
    return name.count("/") > 1 or name.startswith((".", "/", "~", "\\"))


def check_name(name: str, kwargs: dict) -> None:
    """ModelNotFoundError at once for what can be found neither here nor on the Hub: a path without a folder, or a name
    that is not in the local cache while the Hub does not answer (its client would try for most of a minute, several
    times). Anything else is for transformers to find."""
    if os.path.exists(name):
        return
    if is_path(name):
        raise ModelNotFoundError(
            f"there is no folder {name!r}: give a model's or adapter's folder, or a name on the Hub"
        )
    from huggingface_hub import constants, get_session, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    where = {"cache_dir": kwargs.get("cache_dir"), "revision": kwargs.get("revision")}
    files = ["config.json", "adapter_config.json", *filter(None, [kwargs.get("gguf_file")])]
    try:
        kept = [
            try_to_load_from_cache(name, "/".join(filter(None, [kwargs.get("subfolder"), f])), **where) for f in files
        ]
    except HFValidationError:
        return
    if any(isinstance(path, str) for path in kept) or kwargs.get("local_files_only") or is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_ANSWER)
    except Exception as e:  # no answer at all; a refusal would be one
        raise not_found(name, OfflineModeIsEnabled(str(e))) from e


def adapter_config(name: str, kwargs: dict) -> Any:
    """The PEFT config at `name` if an adapter lies there, else None."""
    from peft import PeftConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    hub = {k: kwargs[k] for k in HUB_KEYS if k in kwargs}
    places = {**hub, "revision": kwargs.get("revision"), "subfolder": kwargs.get("subfolder", "")}
    try:
        if find_adapter_config_file(name, **places) is None:
            return None
        return PeftConfig.from_pretrained(name, **{k: v for k, v in places.items() if v})
    except (OSError, ValueError) as e:
        path = os.path.join(name, kwargs.get("subfolder", ""), "adapter_config.json")
        if os.path.exists(path) and (reason := faulty_json(path)):
            raise CheckpointError(reason) from e
        if isinstance(e, OSError):
            raise not_found(name, e) from e
        raise


def base_of_adapter(adapter: Any, name: str, kwargs: dict) -> tuple[str, dict]:
    """(name of the adapter's base model, keyword arguments to load it). Raises AdapterError."""
    if not adapter.base_model_name_or_path:
        raise AdapterError(
            f"the adapter at {name} names no base: set base_model_name_or_path in its adapter_config.json"
        )
    base = {k: v for k, v in kwargs.items() if k not in ("revision", "subfolder")}
    return adapter.base_model_name_or_path, {**base, **({"revision": adapter.revision} if adapter.revision else {})}


def load_config(name: str, kwargs: dict, adapter_at: str | None) -> Any:
    """The configuration at `name`. Raises ModelNotFoundError."""
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(kwargs.get("config"), PreTrainedConfig):
        return kwargs["config"]
    missing = not os.path.exists(os.path.join(name, kwargs.get("subfolder", ""), "config.json"))
    if os.path.isdir(name) and missing and not kwargs.get("gguf_file"):
        raise not_found(name, OSError(), adapter_at)
    skip = ("config", "quantization_config", "torch_dtype")
    try:
        config, _ = AutoConfig.from_pretrained(
            name, return_unused_kwargs=True, **{k: v for k, v in kwargs.items() if k not in skip}
        )
        return config
    except (OSError, ValueError) as e:
        path = os.path.join(name, kwargs.get("subfolder", ""), "config.json")
        if os.path.exists(path) and (reason := faulty_json(path)):
            raise CheckpointError(reason) from e
        if isinstance(e, OSError):
            raise not_found(name, e, adapter_at) from e
        raise


def not_found(name: str, cause: OSError, adapter_at: str | None = None) -> ModelNotFoundError:
    """The error for a checkpoint that is not there, with what to do about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    chain, seen = [], cause
    while seen is not None and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    who = f"{name!r}" if adapter_at is None else f"{name!r}, the base of the adapter at {adapter_at},"
    has = lambda kind: any(isinstance(e, kind) for e in chain)
    if os.path.isdir(name):
        return ModelNotFoundError(f"the folder {who} has no config.json: give the folder that save_pretrained wrote")
    if has(GatedRepoError):
        return ModelNotFoundError(f"{who} is gated: accept its terms on its page on the Hub, then run `hf auth login`")
    if has(RevisionNotFoundError):
        return ModelNotFoundError(
            f"{who} has no such revision: leave revision out, or take one from its page on the Hub"
        )
    if has((LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return ModelNotFoundError(
            f"{who} is neither a folder here nor in the local cache, and the Hub was not reached: check the name or "
            "the network"
        )
    return ModelNotFoundError(
        f"{who} is neither a folder here nor a repository on the Hub that you can read: check the spelling; "
        "for a private one run `hf auth login`"
    )


def model_class(config: Any, task: str | None, kwargs: dict) -> Any:
    """The class that the checkpoint names (as TRL chooses); for an adapter on a classification task that task's auto
    class."""
    import transformers

    if task is not None and AUTO_OF_TASK.get(str(getattr(task, "value", task))):
        return getattr(transformers, AUTO_OF_TASK[str(getattr(task, "value", task))])
    named = (config.architectures or [None])[0]
    found = getattr(transformers, named, None) if named else None
    if found is not None:
        return found
    remote = getattr(config, "auto_map", None) or {}
    for auto in ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        if auto in remote and kwargs.get("trust_remote_code"):
            return getattr(transformers, auto)
    return transformers.AutoModelForCausalLM


def check_length(wanted: int | None, config: Any) -> None:
    """Raises SequenceLengthError where `wanted` tokens are more than the model has positions for."""
    if wanted is None:
        return
    if not isinstance(wanted, int) or wanted < 1:
        raise SequenceLengthError(f"max_seq_length={wanted!r}: want a positive number of tokens")
    has = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(has, int) and wanted > has:
        raise SequenceLengthError(
            f"max_seq_length={wanted}, but this model has {has} positions: train on at most {has} tokens, or extend it "
            "knowingly "
            f"(pass max_position_embeddings={wanted}, with rope_parameters that scale where the model needs them)"
        )
