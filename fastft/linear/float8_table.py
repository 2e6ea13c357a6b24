"""Which products of an FP8 layer are of FP8 matrices, by its shape: looked up in times that were measured before.

A table is one device's, in JSON, as `fastft bench MODEL --fp8` writes it: for each (out, in) the microseconds of the
forward and of the input's gradient with FP8 matrices, and with the weight made dense. Nothing is timed when a model is
loaded or patched, as a time would then decide which bits a run has. Tables that come with fastft lie beside this file
(none does yet: no GPU has measured one); the one of the nearest architecture counts, or the one that the caller names.
A shape that is in none multiplies as it was asked to, and the report says that it was not measured."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastft.errors import QuantizationError
from fastft.linear.float8_linear import Float8Linear, float8_layers, float8_weight
from fastft_kernels.quant.scaled_product import PRODUCTS, why_dense

FOLDER = Path(__file__).parent / "float8_tables"

COLUMNS = ("forward", "backward", "dense_forward", "dense_backward")  # the fields of ProductTimes


class ProductTimes(NamedTuple):
    """Microseconds of one layer's two products, in FP8 and with the weight made dense."""

    forward: float
    backward: float
    dense_forward: float
    dense_backward: float

    def of(self, products: str) -> float:
        """Of a forward and a backward whose products in FP8 are `products`, as Float8Linear's."""
        forward = self.dense_forward if products == "" else self.forward
        return forward + (self.backward if products == "both" else self.dense_backward)


@dataclass(frozen=True)
class Float8Table:
    """What was measured on one device. capability: (major, minor); tokens: rows of the input."""

    device: str
    capability: tuple[int, int]
    tokens: int
    rows: dict[tuple[int, int], ProductTimes]

    @property
    def architecture(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `read` takes it again."""
        rows = [{"out": out, "in": width, **dict(zip(COLUMNS, times))} for (out, width), times in self.rows.items()]
        return {"device": self.device, "capability": list(self.capability), "tokens": self.tokens, "rows": rows}

    @classmethod
    def read(cls, path: str | os.PathLike) -> Float8Table:
        """Raises QuantizationError for a file that is none."""
        try:
            found = json.loads(Path(path).read_text())
            rows = {
                (int(r["out"]), int(r["in"])): ProductTimes(*(float(r[name]) for name in COLUMNS))
                for r in found["rows"]
            }
            major, minor = found["capability"]
            return cls(str(found["device"]), (int(major), int(minor)), int(found["tokens"]), rows)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise QuantizationError(
                f"fp8_table={os.fspath(path)!r}: want a file that `fastft bench MODEL --fp8` wrote, got "
                f"{type(e).__name__}: {e}"
            ) from e


def nearest(tables: Sequence[Float8Table], capability: tuple[int, int]) -> Float8Table | None:
    """The table of the nearest architecture; of two as near the older one's."""
    away = lambda t: (abs(10 * (t.capability[0] - capability[0]) + t.capability[1] - capability[1]), t.capability)
    return min(tables, key=away, default=None)


def chosen(asked: str, shape: tuple[int, int], table: Float8Table | None) -> tuple[str, str]:
    """(the products that are of FP8 matrices, of those asked for; a line for the report)."""
    times = None if table is None else table.rows.get(shape)
    if table is None or times is None:
        return asked, f"{list(shape)}: not measured there, so as asked for"
    allowed = PRODUCTS[: PRODUCTS.index(asked) + 1]
    best = min(reversed(allowed), key=times.of)
    by_way = ", ".join(f"{_NAMES[w]} {times.of(w):.0f}" for w in allowed)
    return best, f"{list(shape)} by {table.architecture}'s table, {table.tokens} tokens, us: {by_way}"


_NAMES = {"": "both dense", "forward": "FP8 forward", "both": "both in FP8"}


def _on_card(layer: Float8Linear) -> bool:
    """Does it lie where its products would be of FP8 matrices, by a GPU?"""
    device = layer.weight.device
    return device.type == "cuda" and not why_dense(float8_weight(layer).layout(), layer.compute_dtype, device)


def choose_products(model: Any, path: str | os.PathLike | None = None, folder: Path = FOLDER) -> None:
    """Each FP8 layer of `model` that would multiply in FP8 on a GPU does so as the table at `path`, or the nearest in
    `folder`, has it."""
    given = None if path is None else Float8Table.read(path)
    layers = [m for m in float8_layers(model) if _on_card(m)]
    tables = [Float8Table.read(p) for p in sorted(folder.glob("*.json"))] if layers and given is None else []
    for layer in layers:
        table = given or nearest(tables, torch.cuda.get_device_capability(layer.weight.device))
        layer.products, layer.choice = chosen(layer.products, (layer.out_features, layer.in_features), table)
