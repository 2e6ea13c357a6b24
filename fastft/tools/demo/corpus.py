"""Real text that every machine has: the signatures and docstrings of Python's standard library; or the user's own data
set.

`stdlib_pairs()` imports the library's public modules and reads `inspect.signature` and `inspect.getdoc` of what they
define: some four thousand pairs. Pairs with the same docstring (inherited methods) are kept once, so that nothing held
out is also trained on."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import pkgutil
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fastft.errors import DatasetError

# modules that do something when they are imported (print, open a browser or a window), or hold no library
AVOID = frozenset({"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "lib2to3"})
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
LONGEST = 240  # characters of a docstring's first paragraph


@dataclass(frozen=True)
class Pair:
    """`name` and `signature` of a callable, `summary` the first paragraph of its docstring on one line, `doc` all of
    it."""

    name: str
    signature: str
    summary: str
    doc: str

    @property
    def prompt(self) -> str:
        return (
            f"### Instruction\nDocument this Python callable.\n\n### Signature\n{self.name}{self.signature}\n\n### "
            "Docstring\n"
        )


def _modules() -> Iterator[ModuleType]:
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in AVOID:
            continue
        with contextlib.suppress(ImportError):  # a module of another platform, or one left out of this build of Python
            module = importlib.import_module(name)
            yield module
            for sub in pkgutil.iter_modules(getattr(module, "__path__", ())):
                if not sub.name.startswith("_") and "test" not in sub.name:
                    with contextlib.suppress(ImportError):
                        yield importlib.import_module(f"{name}.{sub.name}")


def _callables(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for key, thing in sorted(vars(module).items()):
        if key.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing) or inspect.isroutine(thing):
            yield f"{module.__name__}.{key}", thing
        if inspect.isclass(thing):
            for inner, method in sorted(vars(thing).items()):
                method = getattr(method, "__func__", method)
                if not inner.startswith("_") and inspect.isroutine(method):
                    yield f"{module.__name__}.{key}.{inner}", method


def stdlib_pairs() -> list[Pair]:
    """Every documented callable of the standard library whose signature Python knows, sorted by name."""
    found: dict[str, Pair] = {}
    quiet = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        warnings.simplefilter("ignore")  # modules that are deprecated say so on import
        for module in _modules():
            for name, thing in _callables(module):
                doc = inspect.getdoc(thing) or ""
                summary = " ".join(doc.split("\n\n")[0].split())[:LONGEST]
                if not summary:
                    continue
                # no signature to be had of some builtins (of select.epoll's, Python 3.13 raises AttributeError)
                with contextlib.suppress(ValueError, TypeError, AttributeError):
                    signature = str(inspect.signature(thing))
                    if " at 0x" not in signature:  # a default's address would differ from one process to the next
                        found.setdefault(doc, Pair(name, signature, summary, doc))
    return sorted(found.values(), key=lambda p: p.name)


def split(pairs: list[Pair], held_out: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(train, held out), shuffled by `seed`."""
    order = list(pairs)
    random.Random(seed).shuffle(order)
    return order[held_out:], order[:held_out]


def as_dataset(pairs: list[Pair]) -> Any:
    """TRL's prompt-completion format: the loss is on the completion."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": p.prompt, "completion": p.summary} for p in pairs])


def user_dataset(spec: str, held_out: int, seed: int) -> tuple[Any, Any]:
    """(train, held out) from a file (.json, .jsonl, .csv, .parquet, .txt) or a data set's name on the Hub.

    Columns: messages; prompt and completion; text; or instruction, input, output (made into prompt and completion).
    Raises DatasetError with the columns that are there, or the reason why nothing could be loaded.
    """
    from datasets import load_dataset

    ending = os.path.splitext(spec)[1].lower()
    try:
        if os.path.isfile(spec):
            if ending not in FORMATS:
                raise DatasetError(f"--dataset {spec}: want a file ending in {', '.join(FORMATS)}")
            data = load_dataset(FORMATS[ending], data_files=spec, split="train")
        else:
            data = load_dataset(spec, split="train")
    except (OSError, ConnectionError, ValueError) as e:
        if isinstance(e, DatasetError):
            raise
        raise DatasetError(
            f"--dataset {spec} is neither a file here nor a data set on the Hub that can be read: {e}"
        ) from e
    columns = set(data.column_names)
    if {"instruction", "output"} <= columns and not {"messages", "prompt", "text"} & columns:
        extra = lambda row: f"\n{row['input']}" if row.get("input") else ""
        data = data.map(
            lambda row: {
                "prompt": f"### Instruction\n{row['instruction']}{extra(row)}\n### Response\n",
                "completion": row["output"],
            },
            remove_columns=data.column_names,
        )
    elif not ("messages" in columns or "text" in columns or {"prompt", "completion"} <= columns):
        raise DatasetError(
            f"--dataset {spec} has the columns {sorted(columns)}: want messages, or prompt and completion, or text, "
            "or instruction and output"
        )
    if len(data) < 4:
        raise DatasetError(f"--dataset {spec} has {len(data)} rows: want at least 4, some of which are held out")
    parts = data.train_test_split(test_size=min(held_out, len(data) // 4), seed=seed)
    return parts["train"], parts["test"]
