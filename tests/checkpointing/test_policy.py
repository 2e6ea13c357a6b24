"""What a policy may be, and how many layers it takes for a step to fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.checkpointing.policy import MODES, Policy, parse
from fastft.checkpointing.split import Split, choose
from fastft.errors import PolicyError


def test_what_is_understood():
    assert [parse(m).mode for m in MODES] == list(MODES)
    assert parse(12) == parse("12") == Policy("layers", layers=12)
    assert parse("20GiB") == Policy("auto", budget=20 * 2**30)
    assert parse("1.5 GB") == Policy("auto", budget=1_500_000_000)
    assert parse(parse("lean")) == Policy("lean")


@pytest.mark.parametrize("wrong", ["fast", -1, True, 1.5, "GiB", "0GiB", "20 bits", None, ""])
def test_what_is_not_is_refused_with_what_would_be(wrong):
    with pytest.raises(PolicyError, match=r"'auto', 'none', 'lean'.*a number of layers.*'20GiB'"):
        parse(wrong)


def test_an_explicit_policy_holds_whatever_the_trainer_says():
    assert {m for m in MODES if parse(m).is_explicit} == {"none", "lean", "full", "offload"}
    assert parse(3).is_explicit and not parse("3GiB").is_explicit


def test_nothing_is_recomputed_that_fits():
    assert choose([10] * 4, [1] * 4, available=40) == Split(0)
    assert choose([10] * 4, [1] * 4, available=39) == Split(1)
    assert choose([10] * 4, [1] * 4, available=22) == Split(2)
    assert choose([10] * 4, [1] * 4, available=14) == Split(3)  # 3 checkpoints, and one layer: kept, then recomputed
    assert choose([10] * 4, [1] * 4, available=13) == Split(3)
    # the last layer recomputed beside two checkpoints
    assert choose([10] * 4, [1] * 4, available=13, reserve=1) == Split(4, 2)


def test_checkpoints_go_to_the_host_when_even_they_do_not_fit():
    assert choose([10] * 8, [2] * 8, available=24) == Split(7)
    assert choose([10] * 8, [2] * 8, available=20) == Split(8, 3)
    assert choose([10] * 8, [2] * 8, available=14) == Split(8, 6)
    assert choose([10] * 8, [2] * 8, available=13) == Split(8, 8, fits=False)
    assert choose([], [], available=0) == Split(0)


def peak(kept, checkpoint, split):
    """The most bytes that a step holds at once, layer after layer: what `choose` must have foreseen."""
    n, m = split.recomputed, split.offloaded
    on_device = [0 if i < m else checkpoint[i] if i < n else kept[i] for i in range(len(kept))]
    most = held = sum(on_device)
    for i in reversed(range(len(kept))):
        coming = sum(checkpoint[max(0, i - 1) : i + 1]) if i < m else 0
        most = max(most, held + (kept[i] if i < n else 0) + coming)
        held -= on_device[i]
    return most


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=12),
    st.integers(0, 700),
    st.integers(0, 50),
)
def test_a_split_that_fits_fits_and_recomputes_no_layer_too_many(layers, available, reserve):
    kept, checkpoint = [k + c for k, c in layers], [c for _, c in layers]
    uniform_kept, uniform_checkpoint = [max(kept)] * len(kept), [max(checkpoint)] * len(kept)
    split = choose(uniform_kept, uniform_checkpoint, available, reserve)
    if split.fits:
        assert peak(uniform_kept, uniform_checkpoint, split) <= available - reserve
    if split.recomputed and not split.offloaded:
        assert peak(uniform_kept, uniform_checkpoint, Split(split.recomputed - 1)) > available - reserve
    if split.offloaded > 1:
        assert peak(uniform_kept, uniform_checkpoint, Split(len(kept), split.offloaded - 1)) > available - reserve
