"""`fastft report` of an 8B model, from its configuration alone: seconds, on a machine that could not hold its
weights."""

import time

import torch
from transformers import LlamaConfig

from fastft.proving import proof_cache as proofs
from fastft.tools.report import report_from_config

LAYERS = 32
LLAMA_31_8B = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=LAYERS,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
SECONDS = 10.0  # of this process's CPU time, on all its cores together: nobody else's load counts


def test_observation_and_proofs_take_seconds(tmp_path, monkeypatch):
    """No proof is cached yet; every one runs on small tensors, which one layer's worth of weights would not be."""
    LlamaConfig(**LLAMA_31_8B).save_pretrained(tmp_path)
    monkeypatch.setattr(proofs, "CACHE", {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        found = report_from_config(str(tmp_path))
        took = time.process_time() - start
    finally:
        torch.set_num_threads(threads)
    assert took < SECONDS, f"{took:.1f} s"
    assert not found.stock
    counts = {}
    for row in found.swapped:
        counts[row.kind] = counts.get(row.kind, 0) + row.count
    assert (
        counts.items()
        >= {"norm": 2 * LAYERS + 1, "rotary": LAYERS, "mlp": LAYERS, "linear group": 7 * LAYERS, "head": 1}.items()
    )
    assert 0 < len(proofs.CACHE) < 10, "one proof per class and configuration, not one per layer"
