"""TRL's experimental trainers and distillation, twenty steps each, judged against stock."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import fastft
from tests.trainers import harness as h
from tests.trainers.rollouts import PROMPTS, Rollouts, reward

STEPS = 20
# what both trainers do
PADDED = "a padded batch: no labels are given, so that its logits may be looked at where they are padded"
CHATS = h.Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": " ".join(t.split()[:4])},
                {"role": "assistant", "content": " ".join(t.split()[4:])},
            ]
        }
        for t in h.TEXTS
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("teacher"), seed=7)


@pytest.mark.parametrize(
    ("config", "trainer"), [(ORPOConfig, ORPOTrainer), (CPOConfig, CPOTrainer)], ids=["orpo", "cpo"]
)
def test_preferences_on_a_4_bit_base(folder, tmp_path, config, trainer):
    def make(way):
        args = h.arguments(config, tmp_path, STEPS, max_length=40)
        return trainer(
            model=h.load(folder, way, four_bit=True),
            args=args,
            train_dataset=h.preferences(),
            processing_class=h.tokenizer(),
        )

    verdict = h.judged(make)
    assert verdict, str(verdict)


def test_gkd_half_on_policy(folder, teacher, tmp_path):
    rollouts, models = Rollouts(), {}

    def make(way):
        args = h.arguments(GKDConfig, tmp_path, STEPS, max_length=40, max_new_tokens=8, lmbda=0.5)
        made = GKDTrainer(
            model=h.load(folder, way),
            teacher_model=h.load(teacher, "reference" if way == "reference" else "stock", lora=False),
            args=args,
            train_dataset=CHATS,
            processing_class=h.tokenizer(),
        )
        models[way] = made.model
        return rollouts.follow(made, "generate_on_policy_outputs", way)

    verdict = h.judged(make)
    rollouts.check()
    assert verdict, str(verdict)
    assert list(fastft.report(models["fastft"]).fallbacks) == [
        PADDED
    ]  # and no logits: the divergence is taken some tokens at a time


def test_distillation(folder, teacher, tmp_path):
    rollouts = Rollouts()

    def make(way):
        args = h.arguments(DistillationConfig, tmp_path, STEPS, per_device_train_batch_size=4, max_completion_length=8)
        made = DistillationTrainer(
            model=h.load(folder, way),
            teacher_model=h.load(teacher, "reference" if way == "reference" else "stock", lora=False),
            args=args,
            train_dataset=PROMPTS,
            processing_class=h.tokenizer(),
        )
        return rollouts.follow(made, "_generate_single_turn", way)

    verdict = h.judged(make)
    rollouts.check()
    assert verdict, str(verdict)


def test_online_dpo(folder, tmp_path):
    rollouts, models = Rollouts(), {}

    def make(way):
        args = h.arguments(OnlineDPOConfig, tmp_path, STEPS, max_length=40, max_new_tokens=8, missing_eos_penalty=None)
        made = OnlineDPOTrainer(
            model=h.load(folder, way),
            reward_funcs=reward,
            args=args,
            train_dataset=PROMPTS,
            processing_class=h.tokenizer(),
        )
        models[way] = made.model
        return rollouts.follow(made, "_generate", way)

    verdict = h.judged(make)
    rollouts.check()
    assert verdict, str(verdict)
    assert list(fastft.report(models["fastft"]).fallbacks) == [PADDED]
