"""transformers' names beside its documented interface. It is not imported here: most of these are attributes of objects
that a caller has already."""

from __future__ import annotations

import sys
from typing import Any

# Attributes of a GradientCheckpointingLayer: is it recomputed in the backward, and the function that sees to it, called
# as function(forward, *args). An activation policy stands in their place for the length of one forward.
SWITCH, FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"

LOADED = "_is_hf_initialized"  # the loader's mark on modules whose weights came from a checkpoint
GATE = "_apply_gate"  # the method of experts between their two products, where there is a gate
_COLLECTING = "transformers.utils.output_capturing"


def attention_implementation(config: Any) -> str | None:
    """The attention function that a configuration asks for: "sdpa", "eager", ..."""
    return config._attn_implementation


def supports_sdpa(cls: type) -> bool:
    """Does a class of models run its attention through torch's scaled_dot_product_attention? (True where it does not
    say.)"""
    return getattr(cls, "_supports_sdpa", True)


def experts_implementation(config: Any) -> str | None:
    """How a layer of experts multiplies: "eager", "grouped_mm", ...; None where the configuration does not say."""
    return getattr(config, "_experts_implementation", None)


def set_experts_implementation(config: Any, name: str) -> None:
    """Have the layers that read this configuration multiply by the implementation `name`."""
    config._experts_implementation = name


def is_expert_parallel(experts: Any) -> bool:
    """Are the experts of this layer shared out over devices?"""
    return getattr(experts, "_is_expert_parallel", False)


def is_collecting_outputs() -> bool:
    """Does a model collect what its layers pass on now (hidden states, attentions, router logits)?"""
    collector = getattr(sys.modules.get(_COLLECTING), "_active_collector", None)
    return collector is not None and bool(collector.get())


def is_collecting_hook(hook: Any) -> bool:
    """Is this the hook on a layer that does nothing unless outputs are collected?"""
    there = getattr(hook, "__module__", "") == _COLLECTING
    return there and hasattr(sys.modules.get(_COLLECTING), "_active_collector")


def knows(auto_class: Any, config: Any) -> bool:
    """Has an auto class (AutoModelForCausalLM, ...) a model class for this configuration?"""
    return type(config) in auto_class._model_mapping


def from_config(cls: Any, config: Any, **kwargs) -> Any:
    """A model of the class `cls` with random weights. (Auto classes have a public `from_config`, model classes do
    not.)"""
    return cls._from_config(config, **kwargs)


def use_sampler(trainer: Any, make: Any) -> None:
    """Have a Trainer draw its training rows by `make(...)`, a torch Sampler."""
    trainer._get_train_sampler = make


def prepare_inputs(trainer: Any) -> Any:
    """The Trainer's method between its data loader and its loss: batch -> batch."""
    return trainer._prepare_inputs


def set_prepare_inputs(trainer: Any, function: Any) -> None:
    """Put `function` in the place of that method, on this trainer."""
    trainer._prepare_inputs = function
