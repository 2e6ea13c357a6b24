"""Trainers that generate inside the loop. Stock and fastft both sample, from the same seed: in float32 they must draw
the same tokens. Float64 draws other random numbers, so the reference trains on the tokens that stock drew."""

from __future__ import annotations

import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainers import harness as h

PROMPTS = h.Dataset.from_list([{"prompt": " ".join(t.split()[:4])} for t in h.TEXTS])


def reward(completions, completion_ids, **kwargs):
    return [len(set(ids)) + sum(i % 7 for i in ids) / 10 for ids in completion_ids]


class Rollouts:
    """What stock's generation returned, call by call, and where it left the random stream (TRL shuffles the sequences
    after it). `follow` lets another trainer generate too, and then train on the same."""

    def __init__(self):
        self.tape, self.differ = [], 0

    def follow(self, trainer, name: str, way: str):
        real, left = getattr(trainer, name), iter(list(self.tape))

        def generate(*args, **kwargs):
            if way == "stock":
                out = real(*args, **kwargs)
                self.tape.append((copy.deepcopy(out), torch.get_rng_state()))
                return out
            wanted, stream = next(left)
            if way == "fastft":
                self.differ += str(real(*args, **kwargs)) != str(wanted)
            torch.set_rng_state(stream)
            return copy.deepcopy(wanted)

        setattr(trainer, name, generate)
        return trainer

    def check(self):
        assert len(self.tape) > 1 and len({str(t) for t, _ in self.tape}) > 1
        assert not self.differ, f"{self.differ} of {len(self.tape)} generations drew other tokens"


class Wide(TorchDispatchMode):
    """`rows`: the most rows that an operation allocated in a tensor whose last dimension is the vocabulary (a view of
    the weight is none)."""

    def __init__(self, model):
        super().__init__()
        self.vocab, self.rows = model.config.vocab_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        mine = {t.untyped_storage().data_ptr() for t in args if type(t) in (torch.Tensor, torch.nn.Parameter)}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if type(t) is torch.Tensor and t.device.type != "meta" and t.dim() > 1 and t.shape[-1] == self.vocab:
                if t.untyped_storage().data_ptr() not in mine:
                    self.rows = max(self.rows, t.numel() // self.vocab)
        return out
