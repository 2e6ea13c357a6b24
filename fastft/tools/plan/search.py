"""The largest batch and the longest row that fit.

In each phase of a step, beyond one tile of the head, activations and temporary buffers are V(T) = i + T v in tokens T;
all else is constant. The intercept i (a head's tile) does not depend on the depth, so that a second run of a few layers
gives it, and V of the whole model, which is known at the tokens asked for, the slope. Where a mask is made, the square
of a row's length adds to it, which further runs show. Nothing as large as the answer is run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastft.tools.plan.predict import PlannedModel, StepPeakMemory

TILE, MULTIPLE = 4096, 64  # tokens of the head's tile; rows are found in multiples
# bytes an element below which nothing is a mask: a boolean one takes 1. What is linear in a row's length, as cos and
# sin, is less
LEAST_SQUARE = 0.5
ENDLESS = 2**62  # a phase in which tokens play no part
VARYING = ("activations", "temporary")


@dataclass(frozen=True)
class Limits:
    """batch: rows of the length asked for; tokens: of a single row. 0: not even one fits; None: not searched."""

    batch: int | None = None
    tokens: int | None = None


def search(subject: PlannedModel, layers: tuple[int, int], offloaded: int, room: int, batch: int, seq: int) -> Limits:
    """The largest batch and the longest row that fit. layers, offloaded: as `PlannedModel.peak` takes them; room: bytes
    for a step."""
    rows = batch if batch * seq >= TILE else math.ceil(TILE / seq)
    square = _square(subject, layers, offloaded, rows, seq)
    phases = zip(
        subject.peaks(layers, rows, seq, offloaded),
        subject.shallow(layers, rows, seq),
        subject.shallow(layers, 2 * rows, seq),
    )
    found = [_of_phase(*p, room, rows, seq, square if p[0].phase != "optimizer" else 0.0) for p in phases]
    return Limits(min(b for b, _ in found), min(t for _, t in found))


def _of_phase(
    here: StepPeakMemory, first: StepPeakMemory, second: StepPeakMemory, room: int, rows: int, seq: int, square: float
) -> tuple[int, int]:
    """(rows of `seq` tokens, tokens of one row) with which this phase fits. here: its peak with rows x seq tokens;
    first, second: of a few layers with as many tokens, and twice as many; square: bytes for each square of a row's
    length."""
    intercept = 2 * varying(first) - varying(second)
    slope = (varying(here) - intercept) / (rows * seq) - square * seq  # of bytes for a token, this much is a mask's
    left = room - (here.total - varying(here) + intercept)
    if left <= 0:
        return 0, 0
    if slope <= 0:
        return ENDLESS, ENDLESS
    most = math.floor(left / (seq * (slope + square * seq)))
    longest = (-slope + math.sqrt(slope * slope + 4 * square * left)) / (2 * square) if square > 0 else left / slope
    return most, int(longest) // MULTIPLE * MULTIPLE


def varying(peak: StepPeakMemory) -> int:
    """Bytes of a peak that depend on the batch."""
    return sum(peak.parts[k] for k in VARYING)


def _square(subject: PlannedModel, layers: tuple[int, int], offloaded: int, rows: int, seq: int) -> float:
    """Bytes for each square of a row's length: the difference between the same number of tokens in one row and in 2
    `rows` rows, over the difference of the squares."""
    shapes = ((2 * rows, seq), (1, 2 * rows * seq))
    elements = (2 * rows * seq) ** 2 - 2 * rows * seq**2
    if subject.has_squares is None:  # a question of the architecture, not of the policy
        many, one = (max(map(varying, subject.shallow(layers, *s))) for s in shapes)
        subject.has_squares = one - many > LEAST_SQUARE * elements
    if not subject.has_squares:
        return 0.0
    many, one = (varying(subject.peak(layers, *s, offloaded)) for s in shapes)
    return max(0.0, (one - many) / elements)
