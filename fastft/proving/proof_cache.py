"""Where proofs are kept: one for each kind, configuration and device, for the process.

The key of a proof holds everything that it depends on: what the kind says of the module (class, configuration, shapes,
dtypes), and the device on which it ran, by type and compute capability. So a model that moves to another device is
proven again there."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from fastft.proving.prove import Proof, formula_is_enough

CACHE: dict[Hashable, Proof] = {}


def device_key(device: torch.device) -> tuple:
    """What a proof on `device` holds for: its type and, of a CUDA or ROCm device, its compute capability."""
    if device.type == "cuda":
        return ("cuda", *torch.cuda.get_device_capability(device))
    return (device.type,)


def device_name(device: torch.device) -> str:
    """As the report shows it: "cuda sm_90", "cpu"."""
    kind, *capability = device_key(device)
    return f"{kind} sm_{''.join(map(str, capability))}" if capability else kind


def proof_of(kind: str, key: Hashable, device: torch.device, run: Callable[[], Proof]) -> Proof:
    """The proof of `kind` for `key` on `device`; `run()` makes it where there is none yet. What `run` raises is not
    kept. A proof of the formula alone (`formula_alone`) never stands for a whole one."""
    full: tuple = (kind, key, device_key(device))
    if full not in CACHE and formula_is_enough():
        full += ("formula",)
    if full not in CACHE:
        CACHE[full] = replace(run(), device=device_name(device))
    return CACHE[full]


def known_proof(kind: str, key: Hashable, device: torch.device) -> Proof | None:
    """The proof if it has been made."""
    return CACHE.get((kind, key, device_key(device)))
