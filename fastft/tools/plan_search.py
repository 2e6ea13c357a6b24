"""The largest batch and the longest row that fit.

Beyond one tile of the head, activations and temporary buffers are V(T) = i + T v in tokens T; all else is constant. The intercept i (a
head's tile) does not depend on the depth, so that a second run of a few layers gives it, and V of the whole model, which is known at the
tokens asked for, the slope. Where a mask is made, the square of a row's length adds to it, which a third run shows. Nothing as large as
the answer is run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastft.tools.plan_predict import Peak, Subject

TILE, MULTIPLE = 4096, 64  # tokens of the head's tile; rows are found in multiples
NOISE = 1e-3  # of the bytes that vary
VARYING = ("activations", "temporary")


@dataclass(frozen=True)
class Limits:
    """batch: rows of the length asked for; tokens: of a single row. 0: not even one fits; None: not searched."""

    batch: int | None = None
    tokens: int | None = None


def search(subject: Subject, layers: tuple[int, int], offloaded: int, room: int, batch: int, seq: int) -> Limits:
    """layers, offloaded: as `Subject.peak` takes them; room: bytes for a step."""
    rows = batch if batch * seq >= TILE else math.ceil(TILE / seq)
    t = rows * seq
    here = subject.peak(layers, rows, seq, offloaded)
    first, second = (subject.shallow(layers, n, seq) for n in (rows, 2 * rows))
    intercept = 2 * varying(first) - varying(second)
    slope = (varying(here) - intercept) / t
    fixed = here.total - varying(here) + intercept
    square = _square(subject, layers, rows, seq)
    slope -= square * seq  # of the slope above, this much is a mask's
    most = math.floor((room - fixed) / (seq * (slope + square * seq)))
    if square > 0:
        longest = (-slope + math.sqrt(max(slope * slope + 4 * square * (room - fixed), 0.0))) / (2 * square)
    else:
        longest = (room - fixed) / slope
    return Limits(max(most, 0), max(int(longest) // MULTIPLE * MULTIPLE, 0))


def varying(peak: Peak) -> int:
    return sum(peak.parts[k] for k in VARYING)


def _square(subject: Subject, layers: tuple[int, int], rows: int, seq: int) -> float:
    """Bytes for each square of a row's length: of as many tokens in one row as in 2 `rows`, what the one row takes more."""
    if subject.square is None:
        many, one = (varying(subject.shallow(layers, n, s)) for n, s in ((2 * rows, seq), (1, 2 * rows * seq)))
        more = (one - many) / ((2 * rows * seq) ** 2 - 2 * rows * seq**2)
        subject.square = max(0.0, more) if abs(one - many) > NOISE * many else 0.0
    return subject.square
