"""FastModel.from_pretrained: transformers' loader, bitsandbytes' quantisation, PEFT's adapter, then `patch`.

The steps are those of a stock script, in the same order, so that the random stream is consumed in the same way and the
adapter starts from the same bits for the same seed. What is added is defaults, checks that fail in one line before
gigabytes are read, and the report."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from peft import PeftModel

from fastft.api import patch, report
from fastft.checkpointing.policy import parse
from fastft.errors import AdapterError, QuantizationError
from fastft.graphs.attach import check
from fastft.linear.float8_table import choose_products
from fastft.loading.adapter import attach_adapter, default_lora_config, load_adapter
from fastft.loading.checkpoint import (
    adapter_config,
    base_of_adapter,
    check_length,
    check_name,
    load_config,
    model_class,
)
from fastft.loading.float8_saving import see_to_saving
from fastft.loading.fp8 import float8_request, linears_of, quantise, take_float8
from fastft.loading.mistakes import as_peft_config, check_keywords, explained
from fastft.loading.precision import first_device, placement, quantization_config, resolve_dtype


class FastModel:
    """`FastModel.from_pretrained(...)` returns a standard PEFT (or transformers) model, patched."""

    def __init__(self) -> None:
        raise TypeError(
            "FastModel is not a model: call FastModel.from_pretrained(name_or_path), which returns a PeftModel"
        )

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike,
        *,
        peft_config: Any = "lora",
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        load_in_fp8: bool | str = False,
        fp8_backward: str = "fp8",
        fp8_table: str | os.PathLike | None = None,
        dtype: torch.dtype | str = "auto",
        max_seq_length: int | None = None,
        attn_implementation: str | None = None,
        device_map: Any = "current",
        auto_class: Any = None,
        is_trainable: bool = True,
        activation_policy: str | int = "auto",
        cuda_graphs: bool | str = "auto",
        **kwargs: Any,
    ) -> Any:
        """Load a model, attach an adapter, patch, print the report once. Other keywords go to transformers'
        `from_pretrained`.

        Args:
            name_or_path: a repository on the Hub or a folder: of a model, or of an adapter (its base is loaded, then
                it).
            peft_config: any PEFT config, taken as it is, but for a `task_type` that is absent (filled in on a copy,
                from the model's class); or a dictionary of LoraConfig's settings. "lora", the default: LoRA on all
                linear layers, r=16, alpha=32. None: the bare model, for full fine-tuning.
            load_in_4bit: bitsandbytes NF4 with double quantisation; the compute dtype is `dtype` if it is a dtype, else
                bfloat16 where the device has it, else float16.
            load_in_8bit: bitsandbytes LLM.int8. For anything else pass `quantization_config`. The model is returned as
                PEFT makes it: no module is cast. TRL's trainers do the casts of QLoRA themselves; a loop of your own
                with reentrant gradient checkpointing calls `model.enable_input_require_grads()`, as with stock.
            load_in_fp8: frozen linear layers but the head in FP8 (e4m3): True or "rows", with a scale for each output
                row, multiplied in FP8 where the device can (the input and its gradient are rounded too: numbers
                change, the report says by how much); "blocks", one for each 128 x 128, made dense for their products.
                A checkpoint in transformers' fine-grained FP8 is trained as it comes. Bare models (peft_config=None)
                are frozen there.
            fp8_backward: "fp8", or "bf16": the input's gradient by the weight made dense.
            fp8_table: a file that `fastft bench MODEL --fp8` wrote on this device: each shape of layer multiplies in
                FP8 where that was faster. By default the measurements that come with fastft decide, those of the
                nearest architecture; a shape that is in none of them multiplies as asked.
            dtype: a torch dtype, its name, or "auto" (the checkpoint's). bfloat16 on a GPU without it: an error when
                asked for by name; where it is only what the checkpoint says, float16 is taken and a warning says so.
            max_seq_length: the longest sequence you will train on, checked against the model's positions; truncation is
                your trainer's business (`SFTConfig(max_length=...)`).
            attn_implementation: passed through when given.
            device_map: "current", the default: the process's own GPU (the local rank's under a launcher), else no map
                at all (CPU, and where FSDP or DeepSpeed ZeRO-3 place the parameters). Anything else is transformers'
                own.
            auto_class: the class whose `from_pretrained` loads the model, such as AutoModelForSequenceClassification
                for a new reward model. By default the class that the checkpoint names.
            is_trainable: whether an adapter found at `name_or_path` is loaded for training.
            activation_policy: what is kept for the backward and what is computed again. "auto", the default, is about
                the layers that the trainer checkpoints (TRL does by default): of these it recomputes as few as the free
                memory asks for. The others: see `fastft.patch`. Gradients are the same bits under all of them.
            cuda_graphs: whether decoder layers are replayed as CUDA graphs where a training call repeats itself: "auto"
                (where the device has them), True or False; see `fastft.patch`.

        Returns:
            A PeftModel (a PreTrainedModel with peft_config=None), in the mode (train or eval) in which stock returns
            it. The tokenizer is stock: AutoTokenizer.from_pretrained(name_or_path).

        Raises:
            FastftError (a ValueError): as ModelNotFoundError, QuantizationError, DtypeError, TargetModulesError,
                AdapterError, SequenceLengthError, PolicyError, GraphsError, ArgumentError (a keyword that does not
                exist; also a TypeError) or CheckpointError (files that are damaged or missing). Errors of transformers
                beyond these pass through unchanged.
        """
        policy = parse(activation_policy)
        check(cuda_graphs)
        name = os.fspath(name_or_path)
        check_name(name, kwargs)
        default_lora = isinstance(peft_config, str)
        if default_lora and peft_config != "lora":
            raise AdapterError(
                f"peft_config={peft_config!r}: pass a PEFT config such as LoraConfig(...), or None for the bare model, "
                "or nothing"
            )
        if peft_config is not None and not default_lora:
            peft_config = as_peft_config(peft_config)
        where = placement(device_map)
        device = first_device(where)
        adapter = adapter_config(name, kwargs)
        if adapter is not None and peft_config is not None and not default_lora:
            raise AdapterError(
                f"{name} is an adapter already, and peft_config was given too: leave peft_config out to go on training "
                "it, "
                f"or load its base, {adapter.base_model_name_or_path!r}, with your peft_config"
            )

        base_name, base_kwargs = (name, kwargs) if adapter is None else base_of_adapter(adapter, name, kwargs)
        config = load_config(base_name, base_kwargs, adapter_at=name if adapter is not None else None)
        check_keywords(base_kwargs, KEYWORDS, config)
        check_length(max_seq_length, config)
        dtype = resolve_dtype(base_kwargs.pop("torch_dtype", dtype), config, device)
        loader = (
            auto_class
            if auto_class is not None
            else model_class(config, getattr(adapter, "task_type", None), base_kwargs)
        )
        load = dict(base_kwargs, dtype=dtype)
        fp8 = float8_request(
            load_in_fp8,
            fp8_backward,
            {
                "load_in_4bit": load_in_4bit,
                "load_in_8bit": load_in_8bit,
                "quantization_config": base_kwargs.get("quantization_config"),
            },
            config,
        )
        if fp8_table is not None and fp8 is None:
            raise QuantizationError("fp8_table without load_in_fp8=True: pass both, or neither")
        on_host = fp8 is not None and not fp8.is_fp8 and isinstance(where, dict) and set(where) == {""}
        if where is not None and not on_host:
            load["device_map"] = where
        if attn_implementation is not None:
            load["attn_implementation"] = attn_implementation
        quantization = quantization_config(load_in_4bit, load_in_8bit, dtype, config, device, base_kwargs)
        if quantization is not None:
            load["quantization_config"] = quantization

        with explained(base_name, load):
            model = loader.from_pretrained(base_name, **load)
        linears = []
        if fp8 is not None and not (fp8.is_fp8 and take_float8(model, fp8.products, fp8.underflow)):
            linears = linears_of(model)
        if adapter is not None:
            model = load_adapter(model, name, kwargs, is_trainable)
        elif peft_config is not None:
            model = attach_adapter(
                model, default_lora_config() if default_lora else peft_config, kwargs.get("revision")
            )

        if fp8 is not None:
            quantise(model, linears, fp8, device if on_host else None)
            choose_products(model, fp8_table)
            see_to_saving(model.get_base_model() if isinstance(model, PeftModel) else model)
        patch(model, activation_policy=policy, cuda_graphs=cuda_graphs)
        if int(os.environ.get("RANK", "0")) == 0:
            from rich.console import Console

            Console().print(report(model))
        return model


KEYWORDS = tuple(inspect.signature(FastModel.from_pretrained).parameters)[1:-1]  # without the name and **kwargs
