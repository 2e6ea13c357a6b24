"""The measured peak: exact on a CPU for allocations that are known, and of a trainer's second step."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastft.tools.peak import Peak, StepPeak


def model() -> tuple[nn.Linear, int]:
    return nn.Linear(10, 20), 4 * (10 * 20 + 20)


def test_what_lives_at_once_above_what_is_held():
    linear, held = model()
    with Peak(linear) as peak:
        first = torch.empty(1000)
        del first
        second = torch.empty(600)
        third = torch.empty(700)
        del second, third
        torch.empty(900)
    assert peak.bytes == held + 4 * 1300
    assert "1,300" not in str(peak) and "MiB" in str(peak) and "CPU" in str(peak)


def test_optimizer_states_are_held():
    linear, held = model()
    optimizer = torch.optim.Adam(linear.parameters())
    linear(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    with Peak(linear, SimpleNamespace(optimizer=optimizer)) as peak:
        pass
    assert 3 * held <= peak.bytes <= 3 * held + 64  # and a step count for each parameter


def test_a_device_without_an_answer_says_so():
    with pytest.raises(NotImplementedError, match="meta"), Peak(nn.Linear(2, 2, device="meta")):
        pass


def test_a_trainers_second_step():
    linear, held = model()
    seen = StepPeak()
    assert seen.bytes == 0 and "no second step" in str(seen)
    for step, size in enumerate((5000, 1000, 9000)):
        state = SimpleNamespace(global_step=step)
        seen.on_step_begin(None, state, None, model=linear, optimizer=None)
        torch.empty(size)
        seen.on_step_end(None, state, None)
    seen.on_train_end(None, None, None)
    assert seen.bytes == held + 4 * 1000
