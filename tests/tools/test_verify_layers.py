"""fastft verify of a large model: decoder layer by decoder layer, in the memory of a few of them."""

import gc

import pytest
import torch
from typer.testing import CliRunner

import fastft
from fastft.cli import app
from fastft.norm import norms
from fastft.patching.patcher import record_of
from fastft.tools.peak import peak_of_events
from fastft.tools.verify import runner as module
from tests.tools.test_verify import build as tiny

FAMILIES = ("llama", "gemma2")


def build(family="llama", layers=3, hidden=32, lora=True):
    return tiny(
        family, lora, vocab_size=64, num_hidden_layers=layers, hidden_size=hidden, intermediate_size=hidden * 3 // 2
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False])
def test_every_layer_and_the_tail_pass(family, lora):
    model = build(family, lora=lora)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    result = fastft.verify(model, seq=10, layers=True)
    assert result, str(result)
    assert [x.module.rsplit(".", 1)[1] for x in result.lines if x.level == "layer"] == ["0", "1", "2"]
    assert (
        [x.level for x in result.lines][-1] == "tail"
        and "model" not in {x.level for x in result.lines}
        and not result.notes
    )
    assert [type(m) for m in model.modules()] == classes and all(
        torch.equal(v, before[n]) for n, v in model.state_dict().items()
    )


def test_an_error_in_one_layer_is_named(monkeypatch):
    model = fastft.patch(build())
    wrong, real = model.get_base_model().model.layers[1].post_attention_layernorm.weight, norms.rms_norm_with_rstd

    def planted(x, weight, *args, **kwargs):
        y, rstd = real(x, weight, *args, **kwargs)
        return (y * 1.001 if weight is wrong else y), rstd

    monkeypatch.setattr(norms, "rms_norm_with_rstd", planted)
    result = fastft.verify(model, seq=10, layers=True)
    assert [(x.level, x.module) for x in result.failed] == [("layer", "model.layers.1")]
    assert record_of(model) is not None


def test_an_error_after_the_last_layer_is_named(monkeypatch):
    model = build()
    last, real = model.get_base_model().model.norm.weight, norms.rms_norm_with_rstd

    def planted(x, weight, *args, **kwargs):
        y, rstd = real(x, weight, *args, **kwargs)
        return (y * 1.001 if weight is last else y), rstd

    monkeypatch.setattr(norms, "rms_norm_with_rstd", planted)
    result = fastft.verify(model, seq=10, layers=True)
    assert {x.level for x in result.failed} == {"tail"}


def peak(layers: int) -> tuple[int, int]:
    """(bytes that the allocator gave at the most, beside the model; bytes of one layer's parameters)"""
    model = build(layers=layers, hidden=96, lora=False)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        assert fastft.verify(model, seq=8, size=1, layers=True)
    return int(peak_of_events(profile)), sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())


def test_memory_is_that_of_a_few_layers_however_many_there_are():
    (few, layer), (many, _) = peak(3), peak(24)
    assert many < few + layer, (few, many, layer)  # what 21 more layers received is less than one of them
    assert many < 20 * layer, (many, layer)  # a float64 copy alone of all of them is 48


def test_it_is_chosen_by_size_and_by_free_memory(monkeypatch):
    model = build()
    levels = lambda: {x.level for x in fastft.verify(model, seq=4).lines}
    assert "model" in levels()
    monkeypatch.setattr(module, "WHOLE_MODEL_BYTES", 1000)
    assert "layer" in levels()


def test_a_model_that_does_not_run_without_layers_says_so(monkeypatch):
    def refuse(*args, **kwargs):
        raise TypeError("got an unexpected keyword argument 'inputs_embeds'")

    monkeypatch.setattr(module, "tail_of", refuse)
    result = fastft.verify(build(), seq=6, layers=True)
    assert result and "tail" not in {x.level for x in result.lines} and "not verified (TypeError" in result.notes[0]


def test_the_option(tmp_path):
    build(lora=False).save_pretrained(tmp_path / "m")
    run = CliRunner().invoke(app, ["verify", str(tmp_path / "m"), "--seq", "8", "--layers"])
    assert run.exit_code == 0, run.output
    assert "decoder layer: 2" in " ".join(run.output.split()) or "layer" in run.output
