"""A defect in the second tile, in the rescale, or in the last partial tile leaves the module stock, and the report says
so. Defects are larger than rounding and smaller than what a loss curve would show."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastft
from fastft.norm import norms
from fastft.proving import proof_cache
from fastft_kernels.lm_head import online_softmax, tiles

VOCAB = tiles.VOCAB_TILE + 1000  # a first tile and a partial second one
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.fixture(autouse=True)
def no_proofs_from_elsewhere():
    before = dict(proof_cache.CACHE)
    proof_cache.CACHE.clear()
    yield
    proof_cache.CACHE.clear()
    proof_cache.CACHE.update(before)


def kinds(report, swapped):
    return {r.kind for r in (report.swapped if swapped else report.stock)}


def report():
    torch.manual_seed(0)
    return fastft.report(fastft.patch(LlamaForCausalLM(CONFIG).train()))


def second_tile(monkeypatch):
    right = online_softmax.fold
    wrong = lambda logits, bias, target, state, *rest: right(
        logits if state is None else logits + 0.01, bias, target, state, *rest
    )
    monkeypatch.setattr(online_softmax, "fold", wrong)


def no_rescale(monkeypatch):
    """What was accumulated with the former maximum stays as it is."""
    monkeypatch.setattr(online_softmax, "rescale", lambda acc, r: None)


def state_not_rescaled(monkeypatch):
    right = online_softmax.fold

    def wrong(logits, bias, target, state, *rest):
        p, r, new = right(logits, bias, target, state, *rest)
        if state is not None:
            new[online_softmax.A] += state[online_softmax.A] * (1 - r)
        return p, r, new

    monkeypatch.setattr(online_softmax, "fold", wrong)


def last_column(monkeypatch):
    """The last column of the last, partial tile is lost."""
    right = tiles.project

    def wrong(h, weight, span, dtype):
        logits, w = right(h, weight, span, dtype)
        if span[1] == weight.shape[0] and span[0]:
            logits[:, -1] = -1e30
        return logits, w

    monkeypatch.setattr(tiles, "project", wrong)


@pytest.mark.parametrize("plant", [second_tile, no_rescale, state_not_rescaled, last_column])
def test_a_defect_in_the_heads_tiles(plant, monkeypatch):
    assert "head" in kinds(report(), True)
    proof_cache.CACHE.clear()
    plant(monkeypatch)
    found = report()
    assert "head" not in kinds(found, True)
    (row,) = [r for r in found.stock if r.kind == "head"]
    assert row.reason and not row.kernel


@pytest.mark.parametrize(
    "rows", [slice(-1, None), slice(9, None), slice(None, None, 7)], ids=["last", "second", "every 7th"]
)
def test_a_defect_in_some_rows_of_a_norm(rows, monkeypatch):
    def planted(right):
        def wrong(x, *args, **settings):
            out = right(x, *args, **settings)
            y = out[0] if isinstance(out, tuple) else out
            factor = torch.ones(y.numel() // y.shape[-1], 1, dtype=y.dtype)
            factor[rows] += 1e-3
            y = (y.reshape(-1, y.shape[-1]) * factor).reshape(y.shape)
            return (y, *out[1:]) if isinstance(out, tuple) else y

        return wrong

    for name in ("rms_norm", "rms_norm_with_rstd"):
        monkeypatch.setattr(norms, name, planted(getattr(norms, name)))
    found = report()
    assert "norm" not in kinds(found, True)
    (row,) = [r for r in found.stock if r.kind == "norm"]
    assert row.reason and row.count == 3
