"""The CPU benchmark runs, holds its ceilings, and fails when one is passed."""

import json

import pytest

from benchmarks import cpu


def test_layer_and_head_hold_their_ceilings(tmp_path, capsys):
    assert cpu.main(["--quick", "--only", "layer", "head", "host", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("cpu-*.json")
    found = json.loads(path.read_text())
    figures = {f["name"]: f for f in found["figures"]}
    assert {"torch", "transformers", "peft"} <= set(found["environment"]) and "benchmarks.cpu" in found["command"]
    kept = figures["fp32 adapters, bf16 autocast: kept for the backward"]
    assert kept["stock"] == 217_768  # PEFT's own, known from elsewhere: the counting is right
    launches = figures["fp32 adapters, bf16 autocast: launches"]
    assert launches["stock"] == 224
    assert figures["log-probabilities, frozen head: matrix products"]["stock"] == 3
    assert path.with_suffix(".md").read_text().count("| layer: ") == 3


def test_a_figure_above_its_ceiling_fails(tmp_path, monkeypatch, capsys):
    for value, code in ((1.0, 0), (1.001, 1)):
        monkeypatch.setitem(
            cpu.SECTIONS, "host", lambda quick, v=value: [cpu.Figure("host", "planted", "us", v, None, 1.0)]
        )
        assert cpu.main(["--only", "host", "--out", str(tmp_path)]) == code


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        cpu.main(["--only", "gpu"])
