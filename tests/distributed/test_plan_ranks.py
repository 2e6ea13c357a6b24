"""What `fastft plan --gpus` predicts for a rank, beside what one of two gloo processes takes: the whole table."""

import pytest

from benchmarks import plan_ranks

pytestmark = pytest.mark.slow  # 12 cases of real steps in two processes: minutes


@pytest.fixture(scope="module")
def found():
    return dict(plan_ranks.outcomes(list(plan_ranks.rank_cases())))


@pytest.mark.parametrize("name", list(plan_ranks.rank_cases()))
def test_within_5_percent_of_the_allocators_events(found, name):
    """Of the step's peak. (Stock's forward alone, under checkpointing and FSDP2, takes 8% more than is predicted for
    it, below that peak.)"""
    outcome = found[name]
    assert abs(outcome.error) < 0.05
    for phase in ("backward", "optimizer"):
        assert outcome.predicted[phase] == pytest.approx(outcome.measured[phase], rel=0.05), phase
