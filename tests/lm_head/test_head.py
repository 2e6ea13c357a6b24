"""The head of whole models: loss and every gradient with lazy logits judged against stock's, float64 as the reference,
where models slice, scale, cap or share their head; plain trainers and preference losses without the logits; generation
and evaluation are stock's."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastft
from fastft.lm_head.head import KIND
from fastft.lm_head.lazy_logits_type import LazyLogits
from fastft.lm_head.lazy_tensor import LazyTensor
from fastft.proving.float64 import float64_reference
from fastft.swapping.swap import is_fast, stock_class
from fastft_kernels.numerics import compare

SIZES = dict(
    vocab_size=211,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
)
MODELS = {
    "llama": ("Llama", {}),
    "tied": ("Llama", dict(tie_word_embeddings=True)),
    "cap": ("Gemma2", dict(final_logit_softcapping=2.0)),
    "granite": ("Granite", dict(logits_scaling=3.0, attention_multiplier=0.25)),
    "cohere": ("Cohere", dict(logit_scale=0.3)),
    "moe": (
        "Mixtral",
        dict(experts_implementation="eager", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1),
    ),
    "bias": ("Phi", dict(partial_rotary_factor=0.5)),
}
IDS = torch.randint(3, 211, (2, 12), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(IDS % 5 == 0, -100)


def build(name, **more):
    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings, **more}, attn_implementation="eager")
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).train()


def image_text():
    torch.manual_seed(0)
    text = dict(
        SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}, head_dim=None
    )
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, patch_size=4, in_channels=3)
    ids = dict(image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids, attn_implementation="eager")
    return transformers.Qwen2VLForConditionalGeneration(config).train()


def head_alone(model):
    """Only the head is swapped, so that only it can differ from stock."""
    from fastft.lm_head.head import Heads
    from fastft.patching.patcher import apply_kinds

    apply_kinds(model, [Heads()])
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    assert sum(is_fast(m, KIND) for m in base.modules()) >= 1, fastft.report(model)
    return model


def step(model, **inputs):
    out = model(**{"input_ids": IDS, "labels": LABELS, **inputs})
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out.loss, list(trained.values()), allow_unused=True)
    return {"loss": out.loss.detach()} | {n: g for n, g in zip(trained, grads) if g is not None}, out


def judged(build, **inputs):
    ours, out = step(head_alone(build()), **inputs)
    eager, _ = step(build(), **inputs)
    with float64_reference():
        reference = {k: v.double() for k, v in step(build().double(), **inputs)[0].items()}
    assert ours.keys() == eager.keys() == reference.keys()
    assert type(out.logits) is LazyLogits
    flat = lambda r: torch.cat([(v / float(reference[k].abs().max() or 1.0)).flatten() for k, v in r.items()])
    verdict = compare(flat(ours), flat(reference), flat(eager))
    assert verdict, str(verdict)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_all_gradients(name):
    judged(lambda: build(name))


@pytest.mark.parametrize(
    "inputs",
    [dict(num_items_in_batch=torch.tensor(17)), dict(shift_labels=LABELS.roll(-1, 1), labels=LABELS)],
    ids=["items", "shifted"],
)
def test_arguments_of_the_loss(inputs):
    judged(lambda: build("llama"), **inputs)


def test_logits_to_keep():
    for keep, kept in ((5, slice(-5, None)), (torch.tensor([2, 7, 11]),) * 2):
        judged(lambda: build("llama"), logits_to_keep=keep, labels=LABELS[:, kept])


def test_image_text():
    judged(image_text)


def test_lora():
    def lora(name="llama", **settings):
        model = get_peft_model(build(name), LoraConfig(r=2, target_modules=["q_proj"], **settings))
        for n, p in model.named_parameters():
            if "lora_B" in n:
                nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
        return model

    judged(lora)
    judged(lambda: lora(modules_to_save=["lm_head"]))


def test_an_adapter_on_the_head_is_stock_and_says_so():
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    fastft.patch(model)
    assert "an adapter on the head" in {r.reason for r in fastft.report(model).stock if r.kind == KIND}
    assert type(model(input_ids=IDS).logits) is torch.Tensor


class Sizes(TorchDispatchMode):
    """The largest tensor of two or more dimensions that an operation returns, other than a parameter's own size."""

    def __init__(self, model):
        super().__init__()
        self.known, self.largest = {p.shape for p in model.parameters()}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            made = isinstance(t, torch.Tensor) and not isinstance(t, LazyTensor) and t.device.type != "meta"
            if made and (t.dim() != 2 or not {t.shape, t.t().shape} & self.known):
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("name", ["llama", "cap", "moe"])
def test_no_logits_in_a_step(name, monkeypatch):
    from fastft_kernels.lm_head import tiles as head_tiles

    monkeypatch.setattr(head_tiles, "VOCAB_TILE", 128)
    model = head_alone(build(name, vocab_size=2011).requires_grad_(False))
    model.get_input_embeddings().weight.requires_grad_()
    with Sizes(model) as seen:
        model(input_ids=IDS, labels=LABELS).loss.backward()
    assert seen.largest < IDS.numel() * 2011 // 2
    stock = build(name, vocab_size=2011)
    with Sizes(stock) as seen:
        stock(input_ids=IDS, labels=LABELS).loss.backward()
    assert seen.largest >= IDS.numel() * 2011


def test_evaluation_and_generation_are_stock():
    stock = build("llama")
    model = head_alone(copy.deepcopy(stock))
    prompt = dict(
        input_ids=IDS[:, :4], attention_mask=torch.ones(2, 4, dtype=torch.long), max_new_tokens=6, do_sample=False
    )
    for mode in (True, False):
        stock.train(mode), model.train(mode)
        assert torch.equal(model.generate(**prompt), stock.generate(**prompt))
        assert torch.equal(model.generate(**prompt, use_cache=False), stock.generate(**prompt, use_cache=False))
    a, b = model(input_ids=IDS, labels=LABELS), stock(input_ids=IDS, labels=LABELS)
    assert type(a.logits) is torch.Tensor and torch.equal(a.logits, b.logits) and torch.equal(a.loss, b.loss)
    model.train()
    logits = model(input_ids=IDS).logits
    assert torch.equal(logits.detach() + 0, b.logits) and not logits.detach().requires_grad
    with torch.inference_mode():
        assert type(model(input_ids=IDS).logits) is torch.Tensor


def test_counted_when_the_logits_are_used():
    model = head_alone(build("llama"))
    model(input_ids=IDS).logits.topk(3)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert fastft.report(model).fallbacks == {"head: the logits were made for topk": 1}


def test_undo_copy_and_patching_twice():
    model = build("llama")
    keys = list(model.lm_head.__dict__)
    fastft.patch(model)
    copied = copy.deepcopy(model)
    fastft.patch(model)
    assert (
        is_fast(copied.lm_head, KIND)
        and isinstance(model.lm_head, nn.Linear)
        and stock_class(model.lm_head) is nn.Linear
    )
    assert copied.lm_head._fastft.state(KIND).model() is copied
    assert not [n for n in fastft.report(model).notes if "observation" in n]
    gone = weakref.ref(model)
    fastft.unpatch(model)
    assert type(model.lm_head) is nn.Linear and list(model.lm_head.__dict__) == keys
    del model
    gc.collect(), gc.collect()  # the swapped classes, then what they held
    assert gone() is None


def test_weight_is_read_at_the_call():
    model, other = head_alone(build("llama")), build("llama")
    for m in (model, other):
        m.lm_head.weight = nn.Parameter(torch.randn(211, 32, generator=torch.Generator().manual_seed(4)))
    assert torch.allclose(model(input_ids=IDS, labels=LABELS).loss, other(input_ids=IDS, labels=LABELS).loss)
    model.lm_head.weight.data = model.lm_head.weight.data.bfloat16()
    with pytest.raises(RuntimeError):
        model(input_ids=IDS, labels=LABELS)


def test_accelerate_casts_outputs():
    from accelerate.utils import convert_outputs_to_fp32

    model = head_alone(build("llama"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = convert_outputs_to_fp32(model.forward)(input_ids=IDS, labels=LABELS)
    assert type(out.logits) is LazyLogits and out.logits.dtype == torch.float32 and out.loss.dtype == torch.float32
    assert not fastft.report(model).fallbacks


def test_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = head_alone(build("cap"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = model(input_ids=mode.from_tensor(IDS), labels=mode.from_tensor(LABELS))
        out.loss.backward()
    assert isinstance(out.loss, torch._subclasses.FakeTensor) and isinstance(out.logits, LazyLogits)


@pytest.mark.parametrize(
    "settings", [{}, dict(find_unused_parameters=True), dict(static_graph=True)], ids=["plain", "unused", "static"]
)
def test_ddp(tmp_path, settings):
    """DDP walks through the outputs and clones them in a function of its own, which must run in the backward even where
    the loss is made of the logits outside."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, stock = head_alone(build("llama")), build("llama")
        wrapped = nn.parallel.DistributedDataParallel(model, **settings)
        calls = []
        for use in (lambda z: z, lambda z: z.float() * 1.0, lambda z: z * z):
            for m in (wrapped, stock):
                m.zero_grad()
                z = m(input_ids=IDS).logits
                if m is wrapped:
                    calls.append(type(z))
                loss = nn.functional.cross_entropy(use(z[:, :-1]).reshape(-1, 211), LABELS[:, 1:].reshape(-1))
                del z  # kept, it would be made by the backward, before the head learns
                loss.backward()
            for (n, p), q in zip(model.named_parameters(), stock.parameters()):
                assert (p.grad - q.grad).abs().max() <= 1e-5 * q.grad.abs().max(), n
        assert calls == [LazyLogits] * 3 and len(fastft.report(model).fallbacks) == 1
    finally:
        dist.destroy_process_group()


def test_a_clone_by_an_autograd_function_keeps_its_place_in_the_graph():
    """What its backward does, nobody knows beforehand: it is given the gradient that stock would give it."""
    ran = []

    class Sink(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            ran.append(g)
            return g

    grads = []
    for model in (head_alone(build("llama")), build("llama")):
        z = Sink.apply(model(input_ids=IDS).logits)
        loss = nn.functional.cross_entropy(z.view(-1, 211), IDS.view(-1))
        grads += [torch.autograd.grad(loss, list(model.parameters()))]
        z = Sink.apply(model(input_ids=IDS).logits)
        torch.autograd.grad(
            nn.functional.cross_entropy((z + 0.0).view(-1, 211), IDS.view(-1)), list(model.parameters())
        )
    assert all((x - y).abs().max() <= 1e-5 * y.abs().max() for x, y in zip(*grads))
    assert all(torch.allclose(x, ran[2]) for x in ran) and ran[0].shape == (2, 12, 211)


def test_plain_trainer(tmp_path):
    from datasets import Dataset

    class Watching(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, out = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            self.kinds.add((model.training, type(out.logits)))
            return (loss, out) if return_outputs else loss

    def losses(model):
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            optim="sgd",
            learning_rate=0.1,
        )
        data = Dataset.from_list([{"input_ids": r, "labels": r} for r in IDS.repeat(4, 1).tolist()])
        seen = []
        trainer = Watching(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=data.select(range(4)),
            compute_metrics=lambda p: seen.append(p.predictions.shape) or {},
        )
        trainer.kinds = set()
        trainer.train()
        return (
            [e["loss"] for e in trainer.state.log_history if "loss" in e]
            + [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e],
            seen,
            trainer.kinds,
        )

    ours, seen, kinds = losses(head_alone(build("llama")))
    stock, theirs, _ = losses(build("llama"))
    assert kinds == {(True, LazyLogits), (False, torch.Tensor)} and seen == theirs == [(4, 12, 211)]
    assert all(abs(a - b) <= 1e-5 * abs(b) for a, b in zip(ours, stock)) and len(ours) == 3
