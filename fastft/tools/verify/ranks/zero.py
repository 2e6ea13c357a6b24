"""DeepSpeed's engine around the patched model: ZeRO-2 shards gradients and the optimizer, ZeRO-3 the parameters too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastft.tools.verify.ranks.strategies import FSDP2, Strategy
from fastft.tools.verify.ranks.training import Results, optimizer_of, trained

CHECKPOINT = "deepspeed"


class Zero2(Strategy):
    """Every process has all parameters."""

    stage = 2

    def wrap(self, model: Any) -> Any:
        """The engine, which has the optimizer."""
        import deepspeed  # pyright: ignore[reportMissingImports]

        settings = {
            "train_micro_batch_size_per_gpu": self.recipe.rows // dist.get_world_size(),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # DeepSpeed's default clips
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0},
        }
        optimizer = optimizer_of(model, self.recipe.rate)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]

    def made_optimizer(self) -> Any:
        """The engine's own."""
        return self.wrapped.optimizer

    def backward(self, loss: torch.Tensor) -> None:
        """By the engine."""
        self.wrapped.backward(loss)

    def update(self) -> None:
        """By the engine, which clears the gradients."""
        self.wrapped.step()

    def gradients(self) -> Results:
        """By DeepSpeed's own function, as no parameter has its gradient."""
        from deepspeed.utils import safe_get_full_grad  # pyright: ignore[reportMissingImports]

        found = {n: safe_get_full_grad(p) for n, p in trained(self.model).items()}
        return {n: self._whole(n, g) for n, g in found.items() if g is not None}

    def weights(self) -> Results:
        """What the optimizer has, in float32."""
        from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

        return {n: self._whole(n, safe_get_full_fp32_param(p)) for n, p in trained(self.model).items()}

    def _whole(self, name: str, t: Any) -> torch.Tensor:
        p: Any = trained(self.model)[name]
        return t.detach().clone().reshape(getattr(p, "ds_shape", p.shape))

    def save_optimizer(self, folder: Path) -> None:
        """A checkpoint of the engine's, without what does not train."""
        self.wrapped.save_checkpoint(str(folder / CHECKPOINT), exclude_frozen_parameters=True)

    def load_optimizer(self, folder: Path) -> None:
        """That checkpoint."""
        self.wrapped.load_checkpoint(str(folder / CHECKPOINT), load_module_strict=False)

    def close(self) -> None:
        """The engine's hooks go."""
        self.wrapped.destroy()


class Zero3(Zero2):
    """Each module's parameters are gathered for its own call."""

    stage = 3

    @classmethod
    def quantised(cls, dtype: str) -> dict[str, Any]:
        """With the 4-bit weights stored as floats."""
        return FSDP2.quantised(dtype)

    def units(self) -> list[nn.Module]:
        """None that a forward calls for certain."""
        return []

    def state(self) -> dict[str, torch.Tensor] | None:
        """Gathered, a parameter at a time; the first process has it."""
        from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

        first, found = dist.get_rank() == 0, {}
        parameters = dict(self.model.named_parameters())
        for n, p in parameters.items():
            with GatheredParameters([p]):
                if first:
                    found[n] = p.detach().cpu().clone()
        rest = self.model.state_dict()
        tied = {n for n, _ in self.model.named_parameters(remove_duplicate=False)}
        return found | {n: t for n, t in rest.items() if n not in tied} if first else {}
