"""Faults of training in several processes, planted into what `fastft verify --nproc` runs in each."""

from __future__ import annotations

import contextlib
from unittest.mock import patch

import torch
import torch.distributed as dist

from fastft.patching.patcher import innermost
from fastft.tools.verify.layers import decoder_layers
from fastft.tools.verify.ranks import strategies, worker


@contextlib.contextmanager
def another_seed():
    """The second process draws its adapter from another seed."""
    load = worker.load

    def loaded(*args, **more):
        model = load(*args, **more)
        if dist.get_rank() == 1:
            redraw(model)
        return model

    with patch.object(worker, "load", loaded):
        yield


@contextlib.contextmanager
def another_seed_later():
    """As when an adapter is added to a model that DDP has wrapped already: nobody sends it to the others."""
    wrap = strategies.DDP.wrap

    def wrapped(self, model):
        ddp = wrap(self, model)
        if dist.get_rank() == 1:
            redraw(model)
        return ddp

    with patch.object(strategies.DDP, "wrap", wrapped):
        yield


def redraw(model):
    torch.manual_seed(99)
    for n, p in model.named_parameters():
        if "lora_A" in n:
            torch.nn.init.normal_(p.data, std=0.1)


@contextlib.contextmanager
def slice_saved():
    """The first process writes its own slice of the adapter."""
    mine = lambda self: {n: t.to_local() if hasattr(t, "to_local") else t for n, t in self.model.state_dict().items()}
    with patch.object(strategies.FSDP2, "state", mine):
        yield


@contextlib.contextmanager
def stale():
    """One weight of the first layer is computed with as it was gathered first."""
    wrap, kept = strategies.FSDP2.wrap, {}

    def put_back(layer, args):
        weight = next(p for n, p in layer.named_parameters() if "down_proj.lora_B" in n)
        kept.setdefault(layer, weight.detach().clone())
        with torch.no_grad():
            weight.copy_(kept[layer])

    def wrapped(self, model):
        fsdp = wrap(self, model)
        decoder_layers(innermost(model))[1][0].register_forward_pre_hook(put_back)
        return fsdp

    with patch.object(strategies.FSDP2, "wrap", wrapped):
        yield


@contextlib.contextmanager
def copy_kept():
    """A layer computes with its weight as it was at its first call, and the parameter itself is right."""
    wrap = strategies.FSDP2.wrap

    def wrapped(self, model):
        fsdp, kept = wrap(self, model), []

        def instead(layer, args, output):
            down, up = layer.lora_A["default"], layer.lora_B["default"].weight.detach()
            kept.append(up.clone())
            return output + layer.scaling["default"] * down(args[0]) @ (kept[0] - up).T

        decoder_layers(innermost(model))[1][0].mlp.down_proj.register_forward_hook(instead)
        return fsdp

    with patch.object(strategies.FSDP2, "wrap", wrapped):
        yield


@contextlib.contextmanager
def unscaled():
    """Each process's loss is the mean of its own tokens, and the average is of these."""
    mean = lambda model, batch, tokens, counts: model(**batch).loss / dist.get_world_size()
    with patch.object(strategies, "loss_of", mean):
        yield


PLANTS = {f.__name__: f for f in (another_seed, another_seed_later, slice_saved, stale, copy_kept, unscaled)}


def unscaled_process(job):
    """What a process of the command is started with."""
    with unscaled():
        return worker.main(job)
