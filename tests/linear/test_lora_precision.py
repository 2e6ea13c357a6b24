"""The dtypes people train in, patched against stock: of the base, of the adapters, of autocast, of 4- and 8-bit
storage."""

import contextlib
import itertools

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, prepare_model_for_kbit_training

import fastft
from fastft_kernels.lora import dropout
from fastft_kernels.numerics import compare
from tests.linear.lora_models import (
    ALL,
    BASES,
    DRAWS,
    HIDDEN,
    adapted,
    both,
    dense,
    drawn,
    gradients,
    in_float64,
    judge,
    linear_4bit,
    llama,
    nf4,
    quantised,
    run,
    tokens,
    train_step,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}
SMALL = {"layers": 1}


def is_reference(model):
    return any(p.dtype == torch.float64 for p in model.parameters())


def autocast(model, name):
    """As a trainer enters it, for the name of a dtype; nothing in float64."""
    on = name is not None and not is_reference(model)
    return torch.autocast("cpu", DTYPES[name]) if on else contextlib.nullcontext()


def under(name, around=contextlib.nullcontext):
    """Training steps as a trainer runs them, the forward alone under autocast, over so many batches that luck does not
    decide."""

    def step(model):
        out = {}
        for i in range(DRAWS):
            model.zero_grad(set_to_none=True)
            ids = tokens(seed=7 + i)
            with autocast(model, name), around():
                result = model(input_ids=ids, labels=ids)
            result.loss.backward()
            now = {"loss": result.loss, "logits": result.logits, **gradients(model)}
            out |= {f"{k} ({i})": v.detach() for k, v in now.items()}
        return out

    return step


def dtypes_of(model, part):
    return {g.dtype for n, g in gradients(model).items() if part in n}


# fp16 beside bf16 is left out: attention's concatenation raises in stock under CPU autocast
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("name", "cast"),
    [("bf16", None), ("bf16", "bf16"), ("fp16", None), ("fp16", "fp16"), ("fp32", "bf16"), ("fp32", "fp16")],
)
def test_float32_adapters(name, cast, base):
    model = both(lambda: BASES[base](DTYPES[name], config=SMALL), under(cast), draws=1)
    assert dtypes_of(model, "lora") == {torch.float32}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "cast"), [("bf16", None), ("bf16", "bf16"), ("fp16", None)])
def test_adapters_in_the_low_dtype(name, cast, base):
    model = both(lambda: BASES[base](DTYPES[name], fp32=False, config=SMALL), under(cast), draws=1)
    assert dtypes_of(model, "lora") == {DTYPES[name]}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "cast"), [("fp16", None), ("fp32", "fp16")])
def test_gradient_scaler(name, cast, base):
    """Scaled loss, unscaled gradients, the step that the scaler takes or skips."""

    def step(model):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=not is_reference(model))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        out = {}
        for i in range(DRAWS):
            optimizer.zero_grad()
            with autocast(model, cast):
                loss = model(input_ids=tokens(seed=7 + i), labels=tokens(seed=7 + i)).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            grads = gradients(model)
            scaler.step(optimizer)
            scaler.update()
            now = {"loss": loss, **grads, **{f"stepped {n}": p for n, p in model.named_parameters() if p.requires_grad}}
            out |= {f"{k} ({i})": v.detach().clone() for k, v in now.items()}
        return out

    both(lambda: BASES[base](DTYPES[name], config=SMALL), step, draws=1)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "cast"), [("fp16", None), ("fp32", "fp16")])
def test_no_overflow_where_stock_has_none(name, cast, base):
    """The scale from which gradients are infinite, and the steps that are skipped: at least stock's."""

    def largest(model):
        found = 0
        for power in range(4, 40, 2):
            model.zero_grad(set_to_none=True)
            with autocast(model, cast):
                loss = model(input_ids=tokens(), labels=tokens()).loss
            (loss * 2.0**power).backward()
            if all(g.isfinite().all() for g in gradients(model).values()):
                found = power
        return found

    make = lambda: BASES[base](DTYPES[name], config=SMALL)
    ours, stock = fastft.patch(make()), make()
    assert 4 < largest(stock) <= largest(ours) < 38

    before = {n: p.clone() for n, p in ours.named_parameters()}
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**38)
    ours.zero_grad(set_to_none=True)
    with autocast(ours, cast):
        loss = ours(input_ids=tokens(), labels=tokens()).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**37 and all(torch.equal(p, before[n]) for n, p in ours.named_parameters())


FOUR_BIT = [  # of the model, of 4-bit products, how it is stored, autocast
    ("fp32", "fp32", dict(kind="fp4"), None),
    ("fp32", "bf16", dict(kind="fp4", double=True), None),
    ("fp32", "fp16", dict(storage=torch.bfloat16), None),
    ("bf16", "bf16", dict(storage=torch.bfloat16, double=True), None),
    ("bf16", "fp32", dict(storage=torch.float32), None),
    ("bf16", None, dict(kind="fp4", storage=torch.float32), "bf16"),
    ("fp16", "fp16", dict(storage=torch.float16, double=True), None),
    ("fp16", "fp32", dict(double=True), None),
    ("fp32", "fp32", dict(kind="fp4"), "bf16"),
    ("fp32", None, dict(storage=torch.float16), "bf16"),
]


@pytest.mark.parametrize(("name", "compute", "storage", "cast"), FOUR_BIT)
def test_4bit_storage_and_compute(name, compute, storage, cast):
    both(lambda: nf4(DTYPES[name], quant={"compute": DTYPES[compute], **storage}, config=SMALL), under(cast), draws=1)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("compute", "cast", "checkpointing"), [("bf16", None, True), ("bf16", "bf16", False), ("fp16", "fp16", True)]
)
def test_prepare_model_for_kbit_training(compute, cast, checkpointing, base):
    """Norms, embedding and head in float32 around 4-bit products of lower ones."""

    def factory():
        model = llama(DTYPES[compute], **SMALL)
        model = model if base == "dense" else quantised(model, compute=DTYPES[compute])
        return adapted(prepare_model_for_kbit_training(model, checkpointing, {"use_reentrant": False}))

    model = both(factory, under(cast), draws=1)
    norms = {p.dtype for n, p in model.named_parameters() if "norm" in n}
    assert norms == {torch.float32} or base == "dense"


@pytest.mark.parametrize(("name", "cast"), [("fp32", None), ("bf16", None), ("fp32", "bf16")])
@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_4bit_base_bias(bias, name, cast):
    """Prepared for training it is float32, and stock casts it for good: to the compute dtype, or in older bitsandbytes
    to the input's."""

    def factory():
        model = quantised(llama(DTYPES[name], **SMALL, attention_bias=True), compute=torch.bfloat16)
        return adapted(prepare_model_for_kbit_training(model, False), bias=bias)

    model, stock = both(factory, under(cast), draws=1), factory()
    under(cast)(stock)
    biases = lambda m: {n: p.dtype for n, p in m.named_parameters() if n.endswith("base_layer.bias")}
    assert biases(model) == biases(stock)


def partly_quantised(**kinds):
    """A layer's q, k and v as a loader with modules to skip leaves them: dense, or in 4 bits with a compute dtype."""
    model = llama(**SMALL)
    attention = model.model.layers[0].self_attn
    for name, compute in kinds.items():
        setattr(attention, name, linear_4bit(getattr(attention, name), "nf4", compute, False))
    model.is_loaded_in_4bit = True
    return adapted(model)


@pytest.mark.parametrize(
    "kinds",
    [
        dict(q_proj=torch.bfloat16, v_proj=torch.bfloat16),
        dict(k_proj=torch.bfloat16, v_proj=torch.float32),
        dict(q_proj=torch.bfloat16, k_proj=None, v_proj=torch.float32),
    ],
    ids=["dense k", "dense q", "three"],
)
def test_siblings_of_several_kinds(kinds):
    """Each is computed in the dtypes in which stock computes it."""
    both(lambda: partly_quantised(**kinds), under(None))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_adapters_of_several_dtypes(moment, base):
    """A float32 adapter beside a bfloat16 one, on some of the siblings, from the start or since the patch."""

    def second(model):
        torch.manual_seed(4)
        model.add_adapter(
            "second", LoraConfig(r=3, target_modules=["q_proj", "k_proj", "up_proj"]), autocast_adapter_dtype=True
        )
        model.base_model.set_adapter(["default", "second"])
        return drawn(model)

    make = lambda: BASES[base](torch.bfloat16, fp32=False, config=SMALL)
    if moment == "before":
        both(lambda: second(make()), under(None), draws=1)
    else:
        both(make, under(None), after=second, draws=1)


def test_the_first_input_settles_the_compute_dtype():
    """As in stock: a 4-bit layer without a compute dtype takes its first input's, and keeps it when other inputs
    come."""

    found = []
    for model in (nf4(quant={"compute": None}, config=SMALL), fastft.patch(nf4(quant={"compute": None}, config=SMALL))):
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
        assert layer.base_layer.compute_dtype is None
        dtypes = [layer(torch.randn(5, HIDDEN, dtype=d)).dtype for d in (torch.float32, torch.bfloat16)]
        found.append((dtypes, layer.base_layer.compute_dtype, layer.base_layer.compute_type_is_set))
    assert found[0] == found[1] == ([torch.float32, torch.bfloat16], torch.float32, True)


@pytest.mark.parametrize("where", ["q_proj", "k_proj"])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_what_stock_refuses_is_refused(part, where):
    """A sibling's base weight or bias of another dtype than the input: stock raises, so do we."""

    def spoil(model):
        base = model.get_submodule(f"base_model.model.model.layers.0.self_attn.{where}.base_layer")
        base._parameters[part].data = base._parameters[part].data.to(torch.bfloat16)
        return model

    make = lambda: dense(config={**SMALL, "attention_bias": True})
    for model in (spoil(make()), spoil(fastft.patch(make()))):
        with pytest.raises(RuntimeError, match="dtype"):
            train_step(model)


@contextlib.contextmanager
def cuda_flag():
    """Autocast as PEFT sees it on a GPU: it asks without a device, which is about CUDA's."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_autocast_as_peft_sees_it(name, base):
    """4-bit layers cast the adapters' input and output where PEFT sees no autocast, on a CPU, and leave both to
    autocast on a GPU."""
    both(lambda: BASES[base](DTYPES[name], config=SMALL), under("bf16", cuda_flag), draws=1)


ONE_LAYER = [
    *itertools.product(["bf16", "fp16", "fp32"], [None], ["cpu"]),
    *itertools.product(["bf16"], ["fp16"], ["cpu", "cuda"]),
    *itertools.product(["fp16", "fp32"], ["bf16"], ["cpu", "cuda"]),
]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "cast", "flag"), ONE_LAYER)
def test_one_layer(name, cast, flag, base):
    """Where a whole model's noise covers it: float32 adapters have gradients to float32's precision where they are not
    under autocast, and with autocast to the other low dtype what PEFT does not cast back, on a GPU, makes the sum
    float32."""

    given = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3)).to(DTYPES[name])
    upstream = (
        torch.linspace(-1, 1, 5 * HIDDEN).view(5, HIDDEN).to(torch.bfloat16).to(torch.float16)
    )  # exact in every dtype below

    def outputs(model):
        x = (given.double() if is_reference(model) else given.clone()).requires_grad_()
        with autocast(model, cast), cuda_flag() if flag == "cuda" else contextlib.nullcontext():
            y = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")(x)
        y.backward(upstream.to(y.dtype))
        return {"y": y, "d x": x.grad, **gradients(model)}

    make = lambda: BASES[base](DTYPES[name], config=SMALL)
    ours, stock = fastft.patch(make()), make()
    results = run(ours, outputs), run(in_float64(stock), outputs, reference=True), run(stock, outputs)
    for part in ("y", "d x", "d base"):
        judge(*({k: v for k, v in r.items() if k.startswith(part)} for r in results))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("flag", [contextlib.nullcontext, cuda_flag], ids=["cpu", "cuda"])
def test_dropout_draws_in_stocks_dtype(flag, base, monkeypatch):
    """On a GPU the masks depend on it: 4-bit layers drop x as it comes where PEFT sees autocast, else in the dtype of
    A."""
    seen = {True: [], False: []}
    draw = dropout.draw_mask
    monkeypatch.setattr(
        dropout, "draw_mask", lambda like, dtype, *more: seen[True].append(dtype) or draw(like, dtype, *more)
    )
    for fast in (True, False):
        model = BASES[base](torch.bfloat16, dropout=0.1, config=SMALL)
        for n, m in model.named_modules():
            if not fast and n.endswith("lora_dropout.default"):
                m.register_forward_hook(lambda m, args, out: seen[False].append(args[0].dtype))
        if fast:
            fastft.patch(model)
            seen[True].clear()
        with torch.autocast("cpu", torch.bfloat16), flag():
            loss = model(input_ids=tokens(), labels=tokens()).loss
        if fast:
            forwards = list(seen[True])
            loss.backward()
    assert forwards == seen[False] and set(seen[True]) == set(forwards)


def repacking():
    """A 4-bit model as on a CPU with AVX512-BF16: stock's eval forward would repack its weights for inference."""
    model = llama(hidden_size=64, intermediate_size=64, num_key_value_heads=4, layers=1)
    model = quantised(model, compute=torch.float32)
    for m in model.modules():
        if isinstance(m, bnb.nn.Linear4bit):
            m.support_avx512bf16_for_cpu = True
    return model


def test_observing_a_model_in_eval_mode_repacks_nothing():
    model = adapted(repacking(), target_modules=[*ALL, "embed_tokens"]).eval()  # (a small model runs for real)
    was = {n: (p, p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    fastft.patch(model)
    for n, p in model.named_parameters():
        assert p is was[n][0] and p.data_ptr() == was[n][1] and torch.equal(p, was[n][2]), n
    four_bit = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(four_bit) == 7
    assert all(m.support_avx512bf16_for_cpu for m in four_bit)  # as it was
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in four_bit)


@pytest.mark.parametrize("state", ["adapted", "disabled", "inference mode", "some adapted", "handed back", "bare"])
def test_training_after_an_evaluation_has_its_input_gradient(state):
    """Stock repacks, and trains on without the gradients of its inputs. Nothing is repacked here."""
    targets = ["v_proj", "down_proj"] if state == "some adapted" else ALL
    make = lambda: repacking() if state == "bare" else adapted(repacking(), target_modules=targets)

    def evaluate(model):
        model.eval()
        off = model.disable_adapter() if state == "disabled" else contextlib.nullcontext()
        names = {"adapter_names": ["default"]} if state == "handed back" else {}
        with torch.inference_mode() if state == "inference mode" else torch.no_grad(), off:
            logits = model(tokens(), **names).logits.clone()
        model.train()
        return logits

    def train(model):
        embeds = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        out = model(inputs_embeds=embeds, labels=tokens())
        out.loss.backward()
        return {"loss": out.loss, "d inputs_embeds": embeds.grad, **gradients(model)}

    ours, stock = fastft.patch(make()), make()
    true = in_float64(stock)
    logits = evaluate(ours)
    four_bit = [m for m in ours.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(four_bit) == 7 and not any(
        getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in four_bit
    )
    judge(run(ours, train), run(true, train, reference=True), run(stock, train))
    for m in stock.modules():  # what stock answers on another CPU
        m.__dict__.pop("support_avx512bf16_for_cpu", None)
        if isinstance(m, bnb.nn.Linear4bit):
            m.support_avx512bf16_for_cpu = False
    assert compare(logits, evaluate(true), evaluate(stock))
