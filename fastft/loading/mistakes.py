"""Mistakes of callers that the loaders of transformers and PEFT answer with a traceback, answered in one line: keywords
that do not exist, an adapter's settings given to the model, files that are damaged or missing."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from fastft.errors import AdapterError, ArgumentError, CheckpointError

ALIKE = 0.8  # difflib's measure from which on two names are taken for one another
NAMES_OF_TRANSFORMERS = ("quantization_config", "trust_remote_code", "revision", "subfolder", "token", "cache_dir")


def as_peft_config(given: Any) -> Any:
    """The PEFT config that `peft_config=` means: a dictionary is read as LoraConfig's settings, or those of the
    `peft_type` that it names. Raises AdapterError for what is none."""
    from peft import LoraConfig, PeftConfig, get_peft_config

    if isinstance(given, PeftConfig):
        return given
    if isinstance(given, dict):
        try:
            return get_peft_config(dict(given)) if "peft_type" in given else LoraConfig(**given)
        except (TypeError, ValueError, KeyError) as e:
            raise AdapterError(f"peft_config={given!r} is not what PEFT takes ({e}): see peft.LoraConfig") from e
    shown = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
    raise AdapterError(
        f"peft_config: want a PEFT config such as LoraConfig(r=16), a dictionary of its settings, or None for the bare "
        f"model, got {shown}"
    )


def check_keywords(given: dict[str, Any], ours: Iterable[str], config: Any) -> None:
    """Raises ArgumentError for a keyword that belongs to the adapter, or that resembles one of `ours` or of
    transformers' and is no setting of the model's `config`."""
    from peft import LoraConfig, PeftConfig

    of_all = {f.name for f in dataclasses.fields(PeftConfig)}
    of_lora = {f.name for f in dataclasses.fields(LoraConfig)} - of_all
    for name, value in given.items():
        if hasattr(config, name) or name in NAMES_OF_TRANSFORMERS:
            continue
        if name in of_lora:
            raise ArgumentError(
                f"{name}={value!r} is a setting of the adapter: pass peft_config=LoraConfig({name}={value!r}, ...)"
            )
        if near := difflib.get_close_matches(name, [*ours, *NAMES_OF_TRANSFORMERS], 1, ALIKE):
            raise ArgumentError(f"there is no keyword {name}: did you mean {near[0]}={value!r}?")


@contextlib.contextmanager
def explained(name: str, given: dict[str, Any]) -> Iterator[None]:
    """Around transformers' loader of the checkpoint `name`: unknown keywords among `given`, and weights that are
    missing or damaged, become one line. Raises ArgumentError, CheckpointError."""
    from safetensors import SafetensorError

    try:
        yield
    except TypeError as e:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(e))
        if found is None or found[1] not in given:
            raise
        raise ArgumentError(
            f"{found[1]}={given[found[1]]!r} is known neither to FastModel.from_pretrained nor to the model's loader: "
            "leave it out"
        ) from e
    except (SafetensorError, OSError, ValueError) as e:
        other = given.get("variant") or given.get("gguf_file") or given.get("state_dict")
        if not other and (reason := faulty_weights(folder_of(name, given), "model")):
            raise CheckpointError(reason) from e
        if isinstance(e, SafetensorError):
            raise CheckpointError(
                f"a file of weights of {name!r} in the local cache is damaged ({e}): load once with force_download=True"
            ) from e
        raise


def folder_of(name: str, given: dict[str, Any]) -> str:
    """Where the files of `name` lie if it is a folder, its subfolder if one is given."""
    return os.path.join(name, given["subfolder"]) if given.get("subfolder") else name


def faulty_weights(folder: str, stem: str) -> str:
    """What is wrong with the safetensors weights called `stem` in `folder`, and what to do; empty where they can be
    read, or where `folder` is none."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isdir(folder):
        return ""
    index = os.path.join(folder, f"{stem}.safetensors.index.json")
    wanted = {f"{stem}.safetensors"}
    if os.path.exists(index):
        if reason := faulty_json(index):
            return reason
        with open(index) as f:
            wanted = set(json.load(f).get("weight_map", {}).values())
    there = {f for f in os.listdir(folder) if f.endswith((".safetensors", ".bin"))}
    if missing := sorted(wanted - there):
        if not os.path.exists(index):
            if any(f.endswith(".bin") for f in there):
                return ""
            return f"the folder {folder!r} has no weights (no {missing[0]}): copy the files that save_pretrained wrote"
        return f"{missing[0]}, which {index!r} names, is not there: copy or download it again"
    for file in sorted(wanted):
        path = os.path.join(folder, file)
        try:
            with safe_open(path, "pt") as f:
                f.keys()
        except SafetensorError as e:
            size = os.path.getsize(path)
            return f"{path!r} is damaged or cut off at {size:,} bytes ({e}): copy or download it again"
    return ""


def faulty_json(path: str) -> str:
    """What is wrong with a JSON file, and what to do; empty where it can be read."""
    try:
        with open(path, encoding="utf-8") as f:
            json.load(f)
    except (ValueError, OSError) as e:
        return f"{path!r} is no JSON ({e}): copy or download it again"
    return ""
