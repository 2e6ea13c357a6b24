"""Adapters whose start is computed from data, by hooks on the layers that a patch has swapped."""

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

import fastft
from tests.linear.lora_models import ALL, drawn, fallbacks, llama, run, tokens, train_step


@pytest.mark.filterwarnings("ignore::UserWarning")  # EVA's, until its data has been seen
def test_eva_initialised_with_data_on_a_patched_model():
    """Its hooks see what stock's layers are given: the same principal directions (of a base whose sign is free), and
    groups afterwards."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=ALL,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
        task_type="CAUSAL_LM",
    )
    batches = [
        {"input_ids": tokens(4, 16, seed=i), "attention_mask": torch.ones(4, 16, dtype=torch.long)} for i in range(6)
    ]
    found = []
    for patch in (lambda m: m, fastft.patch):
        torch.manual_seed(1)
        model = patch(get_peft_model(llama(), config))
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        found.append({n: p.detach().T @ p.detach() for n, p in model.named_parameters() if "lora_A" in n})
    stock, ours = found
    assert stock.keys() == ours.keys() and len(ours) == 14
    assert max(float((ours[k] - stock[k]).abs().max()) for k in stock) < 64 * torch.finfo(torch.float32).eps
    assert all((p.trace() - 4).abs() < 1e-3 for p in ours.values()), "these are no directions"
    run(drawn(model).train(), train_step)
    assert not fallbacks(model)
