"""Which products are in FP8, by shape: looked up, never timed."""

import json

import pytest
import torch
from torch import nn

from fastft.errors import QuantizationError
from fastft.linear import float8_table
from fastft.linear.float8_error import float8_note
from fastft.linear.float8_linear import Float8Linear
from fastft.linear.float8_table import Float8Table, ProductTimes, choose_products, chosen, nearest
from fastft.tools.bench import fp8
from fastft.tools.bench.timing import ColdTimer
from fastft_kernels.quant import scaled_product

WINS, LOSES = ProductTimes(1, 1, 2, 2), ProductTimes(3, 3, 2, 2)
HALF = ProductTimes(1, 3, 2, 2)  # the forward alone
BACKWARD = ProductTimes(3, 1, 2.5, 9)  # both, as the backward makes up for the forward


def made(capability, rows):
    return Float8Table("card", capability, 8, rows)


@pytest.mark.parametrize(
    ("times", "asked", "products"),
    [
        (WINS, "both", "both"),
        (WINS, "forward", "forward"),
        (LOSES, "both", ""),
        (HALF, "both", "forward"),
        (BACKWARD, "both", "both"),
        (BACKWARD, "forward", ""),
        (ProductTimes(2, 2, 2, 2), "both", "both"),
        (None, "both", "both"),
        (None, "forward", "forward"),
    ],
)
def test_the_faster_way(times, asked, products):
    table = made((9, 0), {} if times is None else {(32, 64): times})
    found, why = chosen(asked, (32, 64), table)
    assert found == products and ("not measured there" in why) == (times is None) and "[32, 64]" in why
    assert chosen(asked, (64, 32), table)[0] == asked


def test_the_nearest_architecture():
    tables = [made(c, {}) for c in ((8, 9), (9, 0), (12, 0))]
    assert [nearest(tables, c).capability for c in ((8, 9), (9, 0), (10, 0), (12, 1))] == [
        (8, 9),
        (9, 0),
        (9, 0),
        (12, 0),
    ]
    assert nearest([made((9, 0), {}), made((8, 8), {})], (8, 9)).capability == (8, 8)
    assert nearest([], (9, 0)) is None


def test_layers_and_report(tmp_path, monkeypatch):
    """On a card (which a CPU stands for) each shape does as its row says, and the report gives the times."""
    layers = nn.Sequential(*(Float8Linear.of(nn.Linear(64, out).bfloat16()) for out in (32, 48, 64)))
    table = made((9, 0), {(32, 64): LOSES, (48, 64): HALF})
    (tmp_path / "card.json").write_text(json.dumps(table.to_dict()))
    assert Float8Table.read(tmp_path / "card.json") == table
    choose_products(layers, folder=tmp_path)
    assert {m.products for m in layers} == {"both"} and not any(m.choice for m in layers)  # of a CPU nothing is said

    monkeypatch.setattr(float8_table, "_on_card", lambda layer: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    choose_products(layers, folder=tmp_path)
    assert [m.products for m in layers] == ["", "forward", "both"]
    notes = [float8_note([m], {}) for m in layers]
    assert notes[0].startswith("FP8 weight made dense for its products ([32, 64] by sm_90's table, 8 tokens, us: ")
    assert "both dense 4, FP8 forward 5, both in FP8 6" in notes[0]
    assert notes[1].startswith("FP8 forward, bf16 backward (") and "not measured there" in notes[2]
    choose_products(layers[2:], folder=tmp_path / "nothing")
    assert "not measured there" in layers[2].choice


@pytest.mark.parametrize("text", [None, "", "{}", '{"device": "a", "capability": [9, 0], "tokens": 1, "rows": [{}]}'])
def test_a_file_that_is_no_table(tmp_path, text):
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(QuantizationError, match=r"fp8_table=.*fastft bench MODEL --fp8"):
        choose_products(nn.Sequential(), path)


def test_a_table_is_measured(tmp_path, monkeypatch):
    """Shapes of a model, each once; a shape that is wrong has no times."""
    timer = ColdTimer(torch.device("cpu"), 0.001, 1, 1, 64)
    found = fp8.measure([(32, 64), (24, 64)], 16, torch.device("cpu"), tmp_path / "new" / "fp8.json", timer)
    assert list(found.table.rows) == [(32, 64)] and all(t > 0 for t in found.table.rows[32, 64])
    assert not found.ok and "no multiple of 16" in found.red[24, 64]
    assert Float8Table.read(found.path) == found.table and found.to_dict()["red"]
    real = scaled_product.transpose_8bit
    monkeypatch.setattr(scaled_product, "transpose_8bit", lambda q, out=None: real(q, out).roll(1, 0))
    assert "dx" in fp8.measure([(32, 64)], 16, torch.device("cpu"), tmp_path / "t.json", timer).red[32, 64]
    with pytest.raises(QuantizationError, match="want a GPU with FP8 units"):
        fp8.bench("nowhere", 16, tmp_path)
