"""bitsandbytes' names beside its documented interface."""

# bool attribute of a Linear4bit: on a CPU with AVX512-BF16 its forward without gradients, in eval mode, rewrites the
# weight in place for inference; training goes on from there without the gradients of its inputs
REPACKS = "support_avx512bf16_for_cpu"
