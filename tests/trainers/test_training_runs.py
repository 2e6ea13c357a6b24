"""What a training run does besides its steps: repeats its bits, resumes, evaluates, stops early, compiles, fails,
changes adapters."""

import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

import fastft
from fastft.errors import LigerError
from fastft.swapping.swap import is_fast
from tests.trainers import harness as h


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("model"))


def sft(model, out, steps=10, callbacks=(), **settings):
    more = {k: settings.pop(k) for k in ("compute_metrics",) if k in settings}
    args = h.arguments(SFTConfig, out, steps, **{"max_length": 32, **settings})
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=h.pairs(),
        eval_dataset=h.pairs().select(range(6)),
        processing_class=h.tokenizer(),
        callbacks=list(callbacks),
        **more,
    )


def bits(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "nf4"])
def test_the_same_seed_gives_the_same_bits(folder, tmp_path, four_bit):
    runs = []
    for _ in range(2):
        trainer = sft(
            h.load(folder, "fastft", four_bit=four_bit, lora_dropout=0.1),
            tmp_path,
            optim="adamw_torch",
            learning_rate=1e-3,
        )
        trainer.train()
        runs.append((bits(trainer.model), [x.get("loss") for x in trainer.state.log_history]))
    assert same(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]


def test_a_resumed_run_ends_on_the_same_bits(folder, tmp_path):
    """Dropout on, Adam, a schedule: the random stream, the optimizer and the place in the data all come from the
    checkpoint."""
    settings = dict(
        optim="adamw_torch", learning_rate=1e-3, lr_scheduler_type="linear", save_strategy="steps", save_steps=5
    )
    whole = sft(h.load(folder, "fastft", lora_dropout=0.1), tmp_path, **settings)
    start = bits(whole.model)
    whole.train()
    set_seed(99)
    resumed = sft(h.load(folder, "fastft", lora_dropout=0.1), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.state.global_step == 10 and not same(bits(resumed.model), start)
    assert same(bits(whole.model), bits(resumed.model))


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_evaluation_sees_real_logits(folder, tmp_path):
    """Metrics of the logits, and losses without any, while training goes on; each judged against stock's."""

    def metrics(p):
        logits, labels = (
            np.asarray(p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions),
            np.asarray(p.label_ids),
        )
        assert logits.shape[-1] == len(h.tokenizer())
        picked = np.take_along_axis(logits[:, :-1], np.maximum(labels[:, 1:], 0)[..., None], -1)[..., 0]
        return {"picked": float(picked[labels[:, 1:] >= 0].mean())}

    for compute_metrics in (None, metrics):
        seen = {}
        for way in ("stock", "fastft"):
            trainer = sft(
                h.load(folder, way),
                tmp_path,
                steps=4,
                eval_strategy="steps",
                eval_steps=2,
                compute_metrics=compute_metrics,
            )
            trainer.train()
            seen[way] = [
                {k: v for k, v in x.items() if k in ("eval_loss", "eval_picked")}
                for x in trainer.state.log_history
                if "eval_loss" in x
            ]
        assert len(seen["stock"]) == len(seen["fastft"]) == 2 and all(
            ("eval_picked" in x) == bool(compute_metrics) for x in seen["fastft"]
        )
        for a, b in zip(seen["stock"], seen["fastft"]):
            assert a.keys() == b.keys() and all(
                abs(a[k] - b[k]) <= 16 * torch.finfo(torch.float32).eps * abs(a[k]) for k in a
            ), (a, b)


def test_early_stopping(folder, tmp_path):
    ends = {}
    for way in ("stock", "fastft"):
        settings = dict(
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            learning_rate=1e-6,
        )
        stop = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1.0)
        trainer = sft(h.load(folder, way), tmp_path / way, steps=12, callbacks=[stop], **settings)
        trainer.train()
        ends[way] = trainer.state.global_step, trainer.state.best_model_checkpoint[-2:]
        assert way == "stock" or any(is_fast(m, "norm") for m in trainer.model.modules()), (
            "the best adapter is loaded into the patched model"
        )
    assert ends["stock"] == ends["fastft"] and ends["stock"][0] < 12


def test_bfloat16_autocast(folder, tmp_path):
    def make(way):
        return sft(h.load(folder, way), tmp_path, steps=20, bf16=True)

    verdict = h.judged(make)
    assert verdict, str(verdict)


def test_a_quantised_model_as_trl_casts_it(folder, tmp_path):
    def make(way):
        return sft(h.load(folder, way, four_bit=True), tmp_path, steps=20, bf16=True)

    verdict = h.judged(make, as_trl_casts=True)
    assert verdict, str(verdict)


def test_compiled(folder, tmp_path):
    """The traced model is fastft's, in whole graphs; stock runs as it is (what is slow here is the compilation)."""

    def make(way):
        compiled = dict(torch_compile=True, torch_compile_backend="eager") if way == "fastft" else {}
        return sft(
            h.load(folder, way), tmp_path, steps=3, packing=True, packing_strategy="wrapped", max_length=16, **compiled
        )

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    verdict = h.judged(make)
    assert verdict, str(verdict)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] and not torch._dynamo.utils.counters["graph_break"]


def test_adapters_trained_one_after_the_other(folder, tmp_path):
    """Two adapters on one patched base: each ends where it ends alone, and neither moves while the other trains."""

    def other(model):
        set_seed(5)
        model.add_adapter(
            "second", LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False)
        )
        return model

    def of(model, name):
        return {n: p.detach().clone() for n, p in model.named_parameters() if f".{name}." in n}

    alone = {}
    for name in ("default", "second"):
        model = other(h.load(folder, "fastft"))
        model.set_adapter(name)
        sft(model, tmp_path, steps=3).train()
        alone[name] = of(model, name)
    model = other(h.load(folder, "fastft"))
    fastft.patch(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}
    before = of(model, "second")
    sft(model, tmp_path, steps=3).train()
    assert same(of(model, "default"), alone["default"]) and same(of(model, "second"), before)
    model.set_adapter("second")
    sft(model, tmp_path, steps=3).train()
    assert same(of(model, "second"), alone["second"]) and same(of(model, "default"), alone["default"])
    assert same({n: p.detach() for n, p in model.named_parameters() if "lora" not in n}, frozen)
    assert not same(before, alone["second"])


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise RuntimeError("planted: the disk is full")


@pytest.mark.parametrize("inside", [False, True], ids=["between-steps", "in-a-forward"])
def test_nothing_is_lost_after_an_exception(folder, tmp_path, inside):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(12)[None] + 5
    model = h.load(folder, "fastft")
    trainer = sft(model, tmp_path, callbacks=[] if inside else [Fails()])
    if inside:
        calls = []

        def hook(module, args):
            calls.append(1)
            if len(calls) == 6:
                raise RuntimeError("planted: the disk is full")

        handle = model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    if inside:
        handle.remove()
    trainer.save_model(str(tmp_path / "saved"))
    fastft.unpatch(model)
    assert not any(hasattr(m, "_fastft") or m._forward_pre_hooks for m in model.modules())
    model.eval()
    reloaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "saved"
    ).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reloaded(input_ids=ids).logits), (
            "saved and restored agree with a stock model, bit for bit"
        )
    fastft.patch(model)
    trainer.remove_callback(Fails)
    trainer.train()
    assert trainer.state.global_step == 10


LIGER = """
import types
def forward(self, *args, **kwargs): return type(self).forward(self, *args, **kwargs)
def _apply_liger_kernel_to_instance(model, **kwargs):
    for m in model.modules():
        if "RMSNorm" in type(m).__name__: m.forward = types.MethodType(forward, m)
"""


def test_liger_is_refused(folder, tmp_path, monkeypatch):
    """A package of that name binds forwards on instances, as the trainer has Liger do just before the first step."""
    from transformers.utils import is_liger_kernel_available

    metadata = {"liger_kernel-0.6.0.dist-info/METADATA": "Name: liger_kernel\nVersion: 0.6.0\n"}
    for name, text in {"liger_kernel/__init__.py": "", "liger_kernel/transformers.py": LIGER, **metadata}.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    is_liger_kernel_available.cache_clear()
    try:
        assert is_liger_kernel_available()
        model = h.load(folder, "fastft")
        with (
            pytest.warns(FutureWarning),
            pytest.raises(LigerError, match=r"use_liger_kernel: .* set it to False, or call fastft.unpatch"),
        ):
            sft(model, tmp_path, steps=2, use_liger_kernel=True).train()
        with pytest.warns(FutureWarning):
            sft(fastft.unpatch(model), tmp_path, steps=2, use_liger_kernel=True).train()
        with pytest.raises(LigerError, match="train without fastft"):
            fastft.patch(model)
    finally:
        is_liger_kernel_available.cache_clear()
        for name in ("liger_kernel", "liger_kernel.transformers"):
            sys.modules.pop(name, None)
