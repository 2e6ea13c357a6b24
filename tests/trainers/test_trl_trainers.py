"""TRL's trainers, untouched: the losses of every step and the final adapter with fastft are as near to a float64 run as
stock's are."""

import pytest
import torch
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from tests.trainers import harness as h

STEPS = 20
BASES = pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "nf4"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("model"))


@BASES
def test_sft(folder, tmp_path, four_bit):
    def make(way):
        args = h.arguments(SFTConfig, tmp_path, STEPS, max_length=32)
        return SFTTrainer(
            model=h.load(folder, way, four_bit=four_bit),
            args=args,
            train_dataset=h.pairs(),
            processing_class=h.tokenizer(),
        )

    verdict = h.judged(make)
    assert verdict, str(verdict)


@pytest.mark.parametrize(
    "settings",
    [
        dict(packing=True, packing_strategy="wrapped", max_length=24),
        dict(padding_free=True, max_length=None),
        dict(completion_only_loss=False, gradient_accumulation_steps=2),
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        dict(neftune_noise_alpha=5.0),
    ],
    ids=["packed", "padding-free", "accumulation", "checkpointing", "reentrant", "neftune"],
)
def test_sft_settings(folder, tmp_path, settings):
    def make(way):
        args = h.arguments(SFTConfig, tmp_path, 6, **settings)
        return SFTTrainer(model=h.load(folder, way), args=args, train_dataset=h.pairs(), processing_class=h.tokenizer())

    if "neftune_noise_alpha" in settings:  # the noise is drawn in the run's dtype: float64 draws other numbers
        stock, ours = h.run(make, "stock"), h.run(make, "fastft")
        far = max(float((ours[k] - stock[k]).abs().max() / stock[k].abs().max()) for k in stock)
        assert far < 64 * torch.finfo(torch.float32).eps, far
        return
    verdict = h.judged(make)
    assert verdict, str(verdict)


@BASES
def test_dpo_with_the_adapter_disabled_as_reference(folder, tmp_path, four_bit):
    def make(way):
        args = h.arguments(DPOConfig, tmp_path, STEPS, max_length=40)
        return DPOTrainer(
            model=h.load(folder, way, four_bit=four_bit),
            args=args,
            train_dataset=h.preferences(),
            processing_class=h.tokenizer(),
        )

    verdict = h.judged(make)
    assert verdict, str(verdict)


@BASES
def test_kto(folder, tmp_path, four_bit):
    def make(way):
        args = h.arguments(KTOConfig, tmp_path, STEPS, max_length=40)
        rows = [
            {"prompt": h.TEXTS[i], "completion": " " + h.TEXTS[(i + 5) % 24], "label": i % 2 == 0} for i in range(24)
        ]
        return KTOTrainer(
            model=h.load(folder, way, four_bit=four_bit),
            args=args,
            train_dataset=h.Dataset.from_list(rows),
            processing_class=h.tokenizer(),
        )

    verdict = h.judged(make)
    assert verdict, str(verdict)


@BASES
def test_reward(tmp_path, tmp_path_factory, four_bit):
    folder = h.checkpoint(tmp_path_factory.mktemp("classifier"), classifier=True)

    def make(way):
        args = h.arguments(RewardConfig, tmp_path, STEPS, max_length=40)
        rows = [{"chosen": h.TEXTS[i], "rejected": h.TEXTS[(i + 11) % 24]} for i in range(24)]
        model = h.load(folder, way, classifier=True, four_bit=four_bit)
        return RewardTrainer(
            model=model, args=args, train_dataset=h.Dataset.from_list(rows), processing_class=h.tokenizer()
        )

    verdict = h.judged(make)
    assert verdict, str(verdict)
