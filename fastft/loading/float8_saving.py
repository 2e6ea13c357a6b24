"""`save_pretrained` of a model whose base is in FP8, so that stock transformers loads what is written.

transformers asks a model's `hf_quantizer` for the tensors to write. A base that came dense is written dense, each
weight the matrix that it stands for, in the dtype that it was made of: what merging an adapter would add to. A base
that came in fine-grained FP8 with scales by block is written as it came, by transformers' own quantizer. Adapters
are PEFT's to save, which never asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from fastft.errors import QuantizationError
from fastft.linear.float8_linear import SCALE, Float8Linear, float8_weight


class Float8Quantizer(HfQuantizer):
    """A model's `hf_quantizer` while its base is in FP8 by `load_in_fp8`. refusal: why there is nothing to write, with
    the fix; empty where there is."""

    def __init__(self, refusal: str = "") -> None:
        super().__init__(None)  # type: ignore[arg-type]  # no configuration: what is written needs none
        self.refusal = refusal

    def is_serializable(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        return True

    def get_state_dict_and_metadata(  # type: ignore[override]
        self, model: nn.Module
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The model's tensors, FP8 weights dense on the host. Raises QuantizationError."""
        if self.refusal:
            raise QuantizationError(self.refusal)
        state = model.state_dict()
        for name, layer in model.named_modules():
            if isinstance(layer, Float8Linear):
                state[f"{name}.weight"] = float8_weight(layer).dense(layer.compute_dtype).cpu()
                del state[f"{name}.{SCALE}"]
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        raise QuantizationError(
            "dequantize() of a base in FP8: the 16-bit weights are gone; load again without load_in_fp8, or "
            "save_pretrained, which writes the matrices that train here, and load those"
        )


def see_to_saving(model: Any) -> None:
    """Give a transformers model with FP8 layers what its save_pretrained needs."""
    layers = [m for m in model.modules() if isinstance(m, Float8Linear)]
    if not layers:
        return
    if getattr(model, "hf_quantizer", None) is None:
        model.hf_quantizer = Float8Quantizer()
    elif any(m.block is None for m in layers):
        model.hf_quantizer = Float8Quantizer(
            "save_pretrained of a base that came in FP8 with one scale a weight: it is frozen, so copy the folder that "
            "it was loaded from, or save the adapter alone"
        )
