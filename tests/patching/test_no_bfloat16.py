"""A bfloat16 model on a device without bfloat16, such as a T4: it trains, and the report says what to do."""

import pytest
import torch

import fastft
from fastft.patching import patcher
from fastft_kernels.runtime import dispatch
from tests.linear.lora_models import adapted, llama, tokens


@pytest.mark.parametrize("has", [False, True])
def test_the_report_says_so(monkeypatch, has):
    for module in (dispatch, patcher):
        monkeypatch.setattr(module, "has_bfloat16", lambda device_type, index: has)
    model = fastft.patch(adapted(llama()).to(torch.bfloat16)).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    report = fastft.report(model)
    assert report.swapped
    said = [line for line in report.notes if "has no bfloat16" in line]
    assert len(said) == (0 if has else 1)
    assert has or ("dtype=torch.float16" in said[0] and "fp16=True" in said[0])
    if not has:
        assert not [n for n in fastft.report(fastft.patch(adapted(llama()))).notes if "bfloat16" in n]
