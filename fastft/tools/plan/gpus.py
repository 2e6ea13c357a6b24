"""How much of a GPU's memory a training step can use.

The sizes are `total_memory` as torch reports it on such a card (its out-of-memory messages print it), rounded down to
0.1 GiB. The constants are estimates with the source beside each; none was measured on a GPU here."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from fastft.checkpointing.memory_meter import SLACK
from fastft.errors import PlanError
from fastft.parsing import parse_bytes

GIB = 2**30
# CUDA context, loaded kernels, cuBLAS handles, taken beside torch's allocator: 0.3 to 0.6 GiB by card and driver
CONTEXT = GIB // 2
# torch's notes on CUDA semantics: the default workspace is ":4096:2:16:8" (KiB x count),
CUBLAS = 8 * 2**20 + 128 * 2**10
CUBLAS_HOPPER = 32 * 2**20  # and ":4096:8" on sm_90; both come out of torch's allocator
BLOCK = 512  # bytes to which torch's caching allocator rounds (kMinBlockSize in CUDACachingAllocator)
MOST_GPUS = 4096  # that are planned for together

_TOTAL = {  # GiB, and the compute capability
    "T4": (14.5, 75),
    "V100": (15.7, 70),
    "3060": (11.7, 86),
    "3090": (23.6, 86),
    "4090": (23.6, 89),
    "5090": (31.3, 120),
    "L4": (22.0, 89),
    "A10G": (22.0, 86),
    "A6000": (47.4, 86),
    "L40S": (44.3, 89),
    "A100-40GB": (39.3, 80),
    "A100": (79.1, 80),
    "H100": (79.1, 90),
    "H200": (139.7, 90),
    "B200": (178.3, 100),
}


@dataclass(frozen=True)
class Gpu:
    """total: bytes of the card. capability: 90 for sm_90; None where only a size was given."""

    name: str
    total: int
    capability: int | None = None

    @property
    def usable(self) -> int:
        """What torch's allocator may hand out before the card is full: without context and with the slack of the policy
        "auto"."""
        return int(self.total * (1 - SLACK)) - CONTEXT

    @property
    def cublas(self) -> int:
        return CUBLAS_HOPPER if self.capability == 90 else CUBLAS

    @property
    def has_bfloat16(self) -> bool:
        return self.capability is None or self.capability >= 80


def known() -> list[Gpu]:
    """The cards with a name, smallest first."""
    return sorted((Gpu(n, int(g * GIB), c) for n, (g, c) in _TOTAL.items()), key=lambda g: g.total)


def several(text: str) -> tuple[int, Gpu]:
    """How many cards, and which, in "4x24GiB", "8 x H100". Raises PlanError."""
    found = re.fullmatch(r"\s*(\d+)\s*[xX*]\s*(\S.*)", text)
    if found is None:
        raise PlanError(f"gpus={text!r}: want a number and a card or a size, as '4x24GiB' or '8xH100'")
    count = int(found[1])
    if not 2 <= count <= MOST_GPUS:
        raise PlanError(f"gpus={text!r}: want from 2 to {MOST_GPUS:,} of them; for one pass gpu={found[2].strip()!r}")
    card = find(found[2])
    if card.usable <= card.cublas:
        raise PlanError(
            f"gpus={text!r}: a CUDA context takes {CONTEXT / GIB:.1f} GiB, which leaves nothing: want larger GPUs"
        )
    return count, card


def find(text: str) -> Gpu:
    """The card that `text` names ("T4", "rtx 4090", "H100"), one of a size ("16GiB"), or this machine's ("this").
    Raises PlanError."""
    if text.lower() == "this":
        import torch

        if not torch.cuda.is_available():
            raise PlanError(
                "gpu='this', but torch sees no CUDA device here: name a card such as 'T4', or a size such as '16GiB'"
            )
        p = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Gpu(p.name, p.total_memory, 10 * p.major + p.minor)
    if size := parse_bytes(text):
        return Gpu(text.strip(), size)
    plain = lambda s: re.sub(r"nvidia|geforce|tesla|rtx|80gb|[\s_-]", "", s.lower())
    for gpu in known():
        if plain(gpu.name) == plain(text):
            return gpu
    near = difflib.get_close_matches(text.lower(), [n.lower() for n in _TOTAL], 1)
    meant = f"{text}GiB" if text.strip().isdecimal() else next((n for n in _TOTAL if n.lower() in near), "")
    if meant:
        raise PlanError(f"gpu={text!r}: did you mean {meant!r}? Want a size such as '16GiB', 'this', or a card's name")
    raise PlanError(f"gpu={text!r}: want a size such as '16GiB', 'this', or one of {', '.join(_TOTAL)}")
