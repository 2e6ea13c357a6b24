"""Trainers of TRL that take the model's logits (no fused head of their own): judged against stock, and the logits are
never made."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

import fastft
from tests.trainers import harness as h

STEPS = 20
TRIPLES = [
    {
        "prompt": h.TEXTS[i],
        "chosen": " " + h.TEXTS[(i + 5) % 24],
        "rejected": " " + h.TEXTS[(i + 11) % 24],
        "reference": " " + h.TEXTS[(i + 3) % 24],
    }
    for i in range(24)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("config", "trainer", "settings"),
    [(ORPOConfig, ORPOTrainer, {}), (CPOConfig, CPOTrainer, {"cpo_alpha": 1.0}), (TPOConfig, TPOTrainer, {})],
    ids=["orpo", "cpo", "tpo"],
)
def test_preferences(folder, tmp_path, config, trainer, settings):
    counts = []

    def make(way):
        args = h.arguments(config, tmp_path, STEPS, max_length=40, **settings)
        data = h.Dataset.from_list(TRIPLES) if config is TPOConfig else h.preferences()
        made = trainer(model=h.load(folder, way), args=args, train_dataset=data, processing_class=h.tokenizer())
        if way == "fastft":
            counts.append(made.model)
        return made

    verdict = h.judged(make)
    assert verdict, str(verdict)
    assert not [k for k in fastft.report(counts[0]).fallbacks if k.startswith("head")], fastft.report(
        counts[0]
    ).fallbacks
