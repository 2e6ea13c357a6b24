"""What the tests of the LM head count: products, bytes that live, the largest tensor; and the heads they run on."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft_kernels.runtime.dispatch import INTERPRETED

# Several tiles both ways at test size; the interpreter takes milliseconds a row and gets few of them.
N, V, TILE = (7, 197, (4, 128)) if INTERPRETED else (37, 997, (20, 128))
SCALINGS = {
    "plain": {},
    "scaled": {"scale": 0.0625, "temperature": 0.7},
    "capped": {"softcap": 3.0, "scale": 1.5, "temperature": 1.3},
}


def head(n=N, h=24, v=V, dtype=torch.float32, device="cpu", ignored=(3, 6)):
    """(hidden, weight, target, bias) with values exact in dtype."""
    g = torch.Generator().manual_seed(n * 1000 + h)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    tensors = (rand(n, h), rand(v, h) / h**0.5 * 2, rand(v) * 0.5)
    hidden, weight, bias = (x.to(device=device, dtype=dtype) for x in tensors)
    target = torch.randint(0, v, (n,), generator=g)
    target[[i for i in ignored if i < n]] = -100
    return hidden, weight, target.to(device), bias


def logits_of(hidden, weight, bias=None, *, scale=1.0, softcap=None, temperature=1.0):
    """z from whole logits, in hidden's dtype."""
    z = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def leaves(tensors, dtype, trained):
    """Copies of (hidden, weight, bias) that need gradients: hidden, and the head if trained."""
    return [x.detach().clone().to(dtype).requires_grad_(i == 0 or trained) for i, x in enumerate(tensors)]


class Count(TorchDispatchMode):
    """products: multiply-adds * 2 of all matrix products; largest: elements of the largest tensor made; peak: bytes
    that lived at once among the tensors made (storages are followed, so views count once)."""

    def __init__(self):
        super().__init__()
        self.products = self.largest = self.peak = self.live = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[:2] if func.overloadpacket is torch.ops.aten.mm else args[1:3]
            self.products += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.linear):
            raise AssertionError(f"a product that is not counted: {func}")
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.follow(x, args)
        return out

    def follow(self, x, args):
        storage = x.untyped_storage()
        key = storage._cdata
        given = {y.untyped_storage()._cdata for y in tree_leaves(args) if isinstance(y, torch.Tensor)}
        if key in self.seen or key in given:
            return
        self.largest = max(self.largest, x.numel())
        self.seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.gone, key, storage.nbytes())

    def gone(self, key, nbytes):
        self.seen.discard(key)
        self.live -= nbytes
