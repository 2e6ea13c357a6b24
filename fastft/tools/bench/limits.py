"""The physical limit of a LoRA step: the least arithmetic and traffic that its shape needs, over what the device was
measured to do.

For T tokens in rows of lengths S_i, frozen linears of sizes in x out, adapters of rank r, L layers with query width Q,
hidden H, vocabulary V:

    linears    2 in out T forward, once more backward: a frozen weight has no gradient
    attention  4 Q L sum_i S_i (S_i + 1) / 2 forward; backward 2.5 times that (five products for two, as flash attention
               recomputes the scores)
    adapters   2 r (in + out) T forward, twice that backward
    head       2 H V for each labelled token, twice: its logits and the gradient of its input; a gradient-free pass once
    traffic    elementwise work alone, each tensor read and written once in 16 bits. Elements a token and layer: two
               norms with the residual
               sums 8 H forward, 8 H backward; rotary 2 (Q + K) each way; the gated product of I channels 3 I forward, 6
               I backward.
               Of the logits: written, read by the loss, written as gradient
    NF4        every quantised weight expanded twice: 0.516 bytes read, 2 written for each element

These are the least counts, not those of what runs, so `torch.utils.flop_counter` does not serve here; tests and
`benchmarks/` count with it what runs. Nothing is recomputed: keeping everything is the fastest where memory allows
it. The limit is arithmetic / FLOP/s + traffic / bandwidth. It bounds dense decoders; `ModelShape.of` raises
ValueError for what has experts in 3-D parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from fastft.tools.bench.timing import Roof

# code, an 8-bit absmax for 64, a float32 absmax for 256 of those: bytes an element
NF4_READ = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class ModelShape:
    """linear: sum of in x out of the decoder's linears; width: sum of in + out of those; layers; hidden; vocab; query,
    key: widths of all heads together; intermediate: 0 where the configuration names none (the bound is then looser)."""

    linear: int
    width: int
    layers: int
    hidden: int
    vocab: int
    query: int
    key: int
    intermediate: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """Of a transformers model (its parameters may lie on the meta device). ValueError for experts held as 3-D
        parameters."""
        if any(p.dim() == 3 for p in model.parameters()):
            raise ValueError("ModelShape.of: want a dense decoder, got a model with 3-D (experts') parameters")
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            sum(m.in_features * m.out_features for m in linears),
            sum(m.in_features + m.out_features for m in linears),
            config.num_hidden_layers,
            config.hidden_size,
            config.vocab_size,
            heads * size,
            (getattr(config, "num_key_value_heads", None) or heads) * size,
            getattr(config, "intermediate_size", None) or 0,
        )


def step_flops(
    shape: ModelShape, lengths: Sequence[int], rank: int, *, labelled: int | None = None, forwards: int = 0
) -> float:
    """Arithmetic of one training step on rows of `lengths`, and of `forwards` gradient-free passes over the same rows
    (a DPO reference: 1).
    labelled: tokens with a label; None is all."""
    tokens = sum(lengths)
    labelled = tokens if labelled is None else labelled
    linear = 2.0 * shape.linear * tokens
    attention = 4.0 * shape.query * shape.layers * sum(s * (s + 1) / 2 for s in lengths)
    adapters = 2.0 * rank * shape.width * tokens
    head = 2.0 * shape.hidden * shape.vocab * labelled
    forward = linear + attention + adapters + head
    return 2 * linear + 3.5 * attention + 3 * adapters + 2 * head + forwards * forward


def step_bytes(
    shape: ModelShape, lengths: Sequence[int], *, labelled: int | None = None, forwards: int = 0, four_bit: bool = False
) -> float:
    """Elementwise traffic of the same step in bytes, and that of expanding 4-bit weights."""
    tokens = sum(lengths)
    labelled = tokens if labelled is None else labelled
    forward = 8 * shape.hidden + 2 * (shape.query + shape.key) + 3 * shape.intermediate
    backward = forward + 3 * shape.intermediate
    layers = 2.0 * tokens * shape.layers * ((1 + forwards) * forward + backward)
    head = 2.0 * labelled * shape.vocab * (3 + 2 * forwards)
    expand = (2 + forwards) * shape.linear * (NF4_READ + 2) if four_bit else 0.0
    return layers + head + expand


def limit_seconds(
    shape: ModelShape, lengths: Sequence[int], rank: int, roof: Roof, *, four_bit: bool = False, **counts
) -> float:
    """The least time of one step. counts: `labelled`, `forwards`."""
    return (
        step_flops(shape, lengths, rank, **counts) / roof.flops
        + step_bytes(shape, lengths, four_bit=four_bit, **counts) / roof.bandwidth
    )
