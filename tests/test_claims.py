"""Published claims go before the planner (which has tests of its own): rows are written, and say no where a claim is
not met."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import claims
from fastft.tools.plan.result import UNMEASURED

LINES = {  # (stack, policy): GiB, longest row
    ("fastft", "lean"): (4, 300),
    ("fastft", "offload"): (2, 400),
    ("fastft", "none"): (9, 90),
    ("stock", "every layer checkpointed (TRL's default)"): (5, 200),
    ("stock", "no checkpointing"): (10, 80),
}


@pytest.fixture
def planned(monkeypatch):
    asked = []

    def plan(config, **settings):
        asked.append(settings)
        lines = [
            SimpleNamespace(stack=s, policy=p, peak=SimpleNamespace(total=n * claims.GIB), longest=t)
            for (s, p), (n, t) in LINES.items()
        ]
        return SimpleNamespace(lines=lines)

    monkeypatch.setattr(claims, "plan", plan)
    return asked


def test_rows_are_judged_and_written(tmp_path, monkeypatch, planned):
    monkeypatch.setattr(
        claims,
        "MEMORY",
        tuple(claims.Memory("LoRA", "Llama-2-7B", 2, 256, False, "as published", r) for r in (0.2, 0.19)),
    )
    monkeypatch.setattr(claims, "CONTEXTS", tuple(claims.Context("16GiB", "as published", n) for n in (400, 401)))
    assert claims.main(["--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("claims-*.json")
    found = json.loads(path.read_text())
    assert found["note"] == UNMEASURED and found["command"] == "python -m benchmarks.claims"
    rows = [claims.Row(**r) for r in found["rows"]]
    assert [r.met for r in rows] == [True, False, True, False]
    assert (rows[0].peft, rows[0].trl, rows[0].fastft, rows[0].policy, rows[0].ratio) == (10, 5, 2, "offload", 0.2)
    assert (rows[2].peft, rows[2].trl, rows[2].fastft, rows[2].ratio) == (80, 200, 400, 1.0)
    assert [claims.markdown(r) for r in rows] == path.with_suffix(".md").read_text().splitlines()[4:]
    assert {s["loss"] for s in planned} == {"model", "trl"}  # PEFT's defaults are the model's own loss
