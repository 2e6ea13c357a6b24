"""A safetensors file written tensor by tensor: in memory is the one that is being written. (`safetensors.save_file`
wants all of them, and copies them once more.)

The format: 8 bytes (the header's length), the header (JSON: dtype, shape and place of every tensor; spaces may follow
it), the data. The header's room is reserved before the data is written, from the names, and filled in at the end."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

_CODES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ENTRY = 256  # bytes of an entry beside its name: dtype, up to six dimensions, two offsets


class ShardWriter:
    """with ShardWriter(path, names) as shard: shard.add(name, tensor). Only names announced may be added; not all of
    them need be."""

    def __init__(self, path: Path, names: Iterable[str]):
        self.names = set(names)
        room = 64 + sum(len(json.dumps(n)) + ENTRY for n in self.names)
        self.room = -(-room // 8) * 8  # data begins aligned
        self.header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        self.at = 0
        self.file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self.file.write(self.room.to_bytes(8, "little") + b" " * self.room)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """ValueError for a name that was not announced or is there already; KeyError for a dtype that the format does
        not have."""
        if name not in self.names or name in self.header:
            raise ValueError(f"safetensors: want a name that was announced and is new, got {name!r}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.file.write(data.numpy().data)
        end = self.at + data.numel()
        self.header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self.at, end]}
        self.at = end

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        with self.file:
            if kind is None:
                self.file.seek(8)
                self.file.write(json.dumps(self.header, separators=(",", ":")).encode().ljust(self.room))
