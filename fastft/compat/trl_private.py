"""TRL's names beside its documented interface. TRL is not imported here."""

from __future__ import annotations

# The trainers bind a forward on a model that takes the keyword FUSED; it multiplies the head's weight itself, through
# the autograd function that it finds by this global name: apply(hidden, weight, bias, targets, temperature, chunk_size,
# softcap, logit_scale, outputs) -> (log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1).
LOG_PROBS = "_ChunkedLogProbFunction"
FUSED = "fused_lm_head"
USE_TRITON = "_use_triton"  # (device) -> bool, a global of the same forward: are rows without a label left out?
# of these results, those that may be asked for by name
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def add_fused_lm_head(model, outputs: tuple[str, ...]) -> None:
    """Bind that forward, as SFTTrainer, DPOTrainer and GRPOTrainer do. Raises ImportError without TRL 1.16."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=outputs)


def accelerate_arguments(arguments: list[str]) -> list[str]:
    """Arguments of `accelerate launch`, TRL's names of configurations (`--accelerate_config fsdp2`) written out as
    paths."""
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    return resolve_accelerate_config_argument(arguments)
