"""What TRL's trainers cannot run here, or run on stock's products: fp16 with a gradient scaler in a loop of one's own,
an 8-bit base in SFT."""

import itertools

import pytest
import torch
from trl import SFTConfig, SFTTrainer

import fastft
from fastft.proving.float64 import float64_reference
from fastft_kernels.numerics import compare
from tests.trainers import harness as h

STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("model"))


def batches():
    for i in range(STEPS):
        rows = h.tokenizer()([h.TEXTS[(i + j) % 24] for j in (0, 7)], return_tensors="pt", padding=True)
        yield {
            "input_ids": rows.input_ids,
            "attention_mask": rows.attention_mask,
            "labels": rows.input_ids.masked_fill(rows.attention_mask == 0, -100),
        }


def fp16_loop(folder, way, scale, skipped=(), growth=5):
    """As the tutorial writes it. skipped: steps left out, as a scaler does. The reference has no scaler."""
    model = h.load(folder, way).train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth, enabled=way != "reference")
    losses, scales = [], [scale]
    for i, batch in enumerate(batches()):
        optimizer.zero_grad()
        if way == "reference":
            with float64_reference():
                loss = model(**batch).loss
                loss.backward()
        else:
            with torch.autocast("cpu", torch.float16):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if i not in skipped:
            scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
        scales.append(scaler.get_scale() if way != "reference" else 1.0)
    found = {"losses": torch.stack(losses)} | {
        n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
    }
    return found, scales


def overflows(scales):
    return {i for i, (a, b) in enumerate(itertools.pairwise(scales)) if b < a}


def test_fp16_with_a_gradient_scaler(folder):
    """Every loss, the final adapter, and the scale, which grows on its way."""
    stock, scales = fp16_loop(folder, "stock", 2.0**8)
    ours, our_scales = fp16_loop(folder, "fastft", 2.0**8)
    assert our_scales == scales and not overflows(scales) and max(scales) == 2.0**12
    verdict = compare(ours, fp16_loop(folder, "reference", 1.0)[0], stock)
    assert verdict and verdict.eager_error < 0.05, str(verdict)


def test_fp16_whose_scale_is_too_large_at_first(folder):
    """Steps that overflow are skipped: none that stock takes, fewer than stock skips. Judged beside a stock run that
    skips the same ones."""
    _, scales = fp16_loop(folder, "stock", 2.0**18, growth=STEPS)
    ours, our_scales = fp16_loop(folder, "fastft", 2.0**18, growth=STEPS)
    skipped = overflows(our_scales)
    assert skipped and skipped <= overflows(scales) and len(skipped) < STEPS // 2
    stock, _ = fp16_loop(folder, "stock", 2.0**8, skipped)
    verdict = compare(ours, fp16_loop(folder, "reference", 1.0, skipped)[0], stock)
    assert verdict and verdict.eager_error < 0.05, str(verdict)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_an_8_bit_base(folder, tmp_path):
    """Its products stay stock's, and the report says why; norms, MLP and head around them are swapped. The reference
    has the dequantised weights."""
    reports = []

    def make(way):
        args = h.arguments(SFTConfig, tmp_path, STEPS, max_length=32)
        model = h.load(folder, way, eight_bit=True)
        if way == "fastft":
            reports.append(fastft.report(model))
        return SFTTrainer(model=model, args=args, train_dataset=h.pairs(), processing_class=h.tokenizer())

    verdict = h.judged(make)
    assert verdict, str(verdict)
    left = [(r.kind, r.count, r.reason) for r in reports[0].stock]
    assert left == [("linear group", 14, "8-bit base: its products quantise the input")]
    assert {r.kind for r in reports[0].swapped} >= {"norm", "rotary", "mlp", "head"}
