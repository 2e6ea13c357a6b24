"""What a model is given to be observed: a few tokens, and for a vision or audio tower a few patches."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

TOKENS = (2, 8)


def text_inputs(model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """A few token ids with a mask, by the model's configuration."""
    forward = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab = getattr(text, "vocab_size", None) or 16
    ids = torch.arange(TOKENS[0] * TOKENS[1], device=device).remainder(max(1, min(vocab - 1, 97))).view(TOKENS)
    out = {}
    if "input_ids" in forward or any(p.kind is p.VAR_KEYWORD for p in forward.values()):
        out["input_ids"] = ids
    if "decoder_input_ids" in forward:
        out["decoder_input_ids"] = ids
    if "use_cache" in forward:
        out["use_cache"] = False
    return out


def _first(config, *names: str, default: int) -> int:
    found = next((v for n in names if (v := getattr(config, n, None))), default)
    return int(found[-1] if isinstance(found, (tuple, list)) else found)


def tower_inputs(model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """For a module that takes images or sound: pixel_values of the size it was built for, flattened patches with their
    grid, or mel features. Raises TypeError where the signature shows none of these."""
    forward = inspect.signature(model.forward).parameters
    config, names = getattr(model, "config", None), list(forward)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    draw = lambda *shape: torch.zeros(shape, device=device).add_(0.1).to(dtype)
    channels, patch = (
        _first(config, "num_channels", "in_channels", "in_chans", default=3),
        _first(config, "patch_size", default=14),
    )
    grid = next((n for n in names if n.endswith("grid_thw")), None)
    if grid is not None:
        side = 2 * _first(config, "spatial_merge_size", "merge_size", default=2)
        flat = channels * _first(config, "temporal_patch_size", default=1) * patch * patch
        return {
            names[0]: draw(side * side, flat),
            grid: torch.tensor([[1, side, side]], device="cpu" if device.type == "meta" else device),
        }
    if "pixel_values" in names:
        side = _first(config, "image_size", default=4 * patch)
        return {"pixel_values": draw(1, channels, side, side)}
    if "input_features" in names:
        return {
            "input_features": draw(
                1, _first(config, "num_mel_bins", default=80), 2 * _first(config, "max_source_positions", default=16)
            )
        }
    raise TypeError(f"its inputs are {names[:3]}")


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
