"""fastft plan for several GPUs: what each rank is said to hold and to send."""

import json

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig
from typer.testing import CliRunner

import fastft
from benchmarks.plan_error import llama
from fastft.cli import app
from fastft.errors import ModelNotFoundError, PlanError
from fastft.tools.plan.gpus import GIB, several
from fastft.tools.plan.predict import PlannedModel, TrainingSetup, subject
from fastft.tools.plan.ranks.needed import gpus_needed, sent
from fastft.tools.plan.ranks.strategies import RankSetup

F32 = torch.float32
WAY = (0, 6)  # nothing recomputed
SHAPE = (1, 32)


def planned(ranks: RankSetup | None) -> PlannedModel:
    """Full fine-tuning of six layers."""
    config = llama(6, hidden_size=64, intermediate_size=128, vocab_size=128)
    setting = TrainingSetup(F32, None, None, F32, False, "adamw_torch", False, "model", False, ranks=ranks)
    return subject(config, setting)


@pytest.fixture(scope="module")
def fsdp2():
    return planned(RankSetup("fsdp2", 2))


@pytest.fixture(scope="module")
def alone():
    return planned(None)


def test_what_is_sharded_is_divided_and_the_model_is_as_before(fsdp2, alone):
    parameters = sum(p.numel() * 4 for p in alone.model.parameters())
    for count in (2, 4):
        peaks = fsdp2.on(RankSetup("fsdp2", count)).peaks(WAY, *SHAPE)
        last = peaks[-1].parts
        assert last["weights"] == parameters / count and last["gradients"] == parameters / count
        assert last["optimizer"] == pytest.approx(2 * parameters / count, rel=0.01)
        layer = sum(p.numel() * 4 for p in fsdp2.pool[0].parameters())
        assert max(p.parts["gathered"] for p in peaks) in (layer, 2 * layer)
    assert not any(isinstance(m, FSDPModule) or m._forward_pre_hooks for m in fsdp2.model.modules())
    assert not any(isinstance(p, DTensor) for p in fsdp2.model.parameters())
    assert not torch.distributed.is_initialized()


def test_few_layers_say_what_all_of_them_take(fsdp2):
    """Windows of gathered layers are as many in a deep model as in a shallow one: to the byte."""
    whole = PlannedModel(**{**vars(fsdp2), "period": None, "runs": {}, "others": {}})
    for a, b in zip(fsdp2.peaks(WAY, *SHAPE), whole.peaks(WAY, *SHAPE)):
        assert a == b
    assert fsdp2.whole(WAY, *SHAPE).moved == whole.whole(WAY, *SHAPE).moved


def test_what_the_collectives_move(fsdp2, alone):
    """Every layer is gathered for the forward and for the backward, the embeddings and the head once more or less; each
    gradient is summed once."""
    parameters = sum(p.numel() * 4 for p in alone.model.parameters())
    layers = sum(p.numel() * 4 for m in fsdp2.pool for p in m.parameters())
    moved = fsdp2.whole(WAY, *SHAPE).moved
    assert moved["reduce-scatter"] == parameters
    assert parameters + layers <= moved["all-gather"] <= 2 * parameters
    assert moved["all-reduce"] < 1024  # the norm of the gradients
    ddp = alone.on(RankSetup("ddp", 2)).whole(WAY, *SHAPE)
    assert ddp.moved == {"all-reduce": parameters} and ddp.static["communication"] == parameters


def test_bytes_in_a_ring():
    assert sent({"all-gather": 800, "all-reduce": 800}, 4, 1) == {"all-gather": 600, "all-reduce": 1200}
    assert sent({"reduce-scatter": 100}, 2, 3) == {"reduce-scatter": 150}


def test_the_gpus_that_are_needed(fsdp2, alone):
    """Between what 2 and 4 take, 3 do; one takes all of it, and some of it nobody shares."""
    peak = lambda n: fsdp2.on(RankSetup("fsdp2", n)).peak(WAY, *SHAPE).total
    needed = lambda room: gpus_needed(fsdp2, WAY, *SHAPE, 0, room)
    assert needed(alone.peak(WAY, *SHAPE).total) == 1
    assert peak(4) < peak(2) and needed((peak(2) + peak(4)) // 2) == 3 and needed(peak(2)) == 2
    assert needed(100_000) is None
    assert gpus_needed(alone.on(RankSetup("ddp", 2)), WAY, *SHAPE, 0, peak(2)) is None


def test_a_plan_for_several(tmp_path):
    """As JSON, alone on stdout."""
    tiny = llama(2, hidden_size=64, intermediate_size=128, vocab_size=128, max_position_embeddings=64)
    tiny.save_pretrained(tmp_path)
    line = ["plan", str(tmp_path), "--gpus", "2x1GiB", "--strategy", "ddp", "--seq", "32", "--batch", "2", "--json"]
    found = json.loads(CliRunner().invoke(app, line).stdout)
    assert (found["gpus"], found["strategy"], found["gpu"]["total"]) == (2, "ddp", GIB)
    first = found["lines"][0]
    assert first["moved"]["all-reduce"] == first["peak"]["parts"]["adapters"] and first["gpus_needed"] == 1
    assert any("beyond the 64 positions" in n for n in found["notes"])


def test_the_table_of_several():
    tiny = llama(2, hidden_size=64, intermediate_size=128, vocab_size=128)
    shown = str(fastft.plan(tiny, gpus="2x1GiB", strategy="ddp", seq=32, batch=2, stock=False, limits=False))
    assert "GPUs needed" in shown and "sent: all-reduce" in " ".join(shown.split())
    assert "on each of 2 x 1GiB" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gpus": "4x"}, "gpus='4x': want a number and a card or a size"),
        ({"gpus": "24GiB"}, "want a number and a card or a size, as '4x24GiB'"),
        ({"gpus": "1x24GiB"}, "want from 2 to 4,096 of them; for one pass gpu='24GiB'"),
        ({"gpus": "2xH1000"}, "did you mean 'H100'"),
        ({"gpus": "2x400MiB"}, "a CUDA context takes 0.5 GiB, which leaves nothing"),
        ({"gpus": "2x1GiB", "strategy": "fsdp"}, "strategy='fsdp': want one of ddp, fsdp2"),
        ({"strategy": "ddp"}, "strategy='ddp' is for several GPUs"),
        ({"gpu": "T4", "gpus": "2xT4"}, "were both given"),
        ({"gpus": "2x1GiB", "accumulate": 4}, "accumulate=4 is not planned under fsdp2"),
    ],
)
def test_bad_input_is_one_line(arguments, said):
    with pytest.raises(PlanError) as error:
        fastft.plan(LlamaConfig(num_hidden_layers=2), **arguments)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ModelNotFoundError) as error:
        fastft.plan(tmp_path / "nowhere")
    assert "there is no such folder" in str(error.value) and "\n" not in str(error.value)


def test_cards_by_number():
    assert several("4x24GiB")[0] == 4 and several(" 8 x H100 ")[1].name == "H100"
