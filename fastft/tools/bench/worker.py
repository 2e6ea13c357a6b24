"""One stack of `fastft bench` in a process of its own: python -m fastft.tools.bench.worker SPEC.json ROWS.jsonl

Loads once, runs the gate, then its cells in order. One JSON line for each, flushed: a crash or an out-of-memory loses
one cell."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from fastft.compat.accelerate_private import ORIGINAL_FORWARD
from fastft.tools.bench.spec import DRAWS, Spec


def main(argv: list[str]) -> int:
    """One stack, measured in a process of its own; what it finds goes to standard output as JSON."""
    spec, rows = Spec.read(Path(argv[0])), Path(argv[1])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if spec.stack == "unsloth" and importlib.util.find_spec("unsloth") is not None:
        importlib.import_module("unsloth")  # it asks to come before transformers, peft and trl
    Worker(spec, rows).run()
    return 0


class Worker:
    """Measures one stack in this process."""

    def __init__(self, spec: Spec, rows: Path):
        self.spec, self.rows, self.folder = spec, rows, Path(spec.folder)
        self.refused: dict[str, str] = {}  # gated cell -> why its speed is not to be shown

    def say(self, **line: Any) -> None:
        with self.rows.open("a") as f:
            f.write(json.dumps({"stack": self.spec.stack, **line}) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def run(self) -> None:
        from fastft.tools.bench.stacks import MissingPeer, load
        from fastft.tools.tokenizer import load_tokenizer

        try:
            begun = time.perf_counter()
            self.model, self.tokenizer = load(self.spec), load_tokenizer(self.spec.model)
            self.say(loaded=time.perf_counter() - begun, about=self._about())
        except MissingPeer as e:
            self.say(missing=str(e))
            return
        self.model.config.use_cache = False
        self.start = {n: p.detach().cpu().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        self.adapters = set(self.model.peft_config)
        self.forwards = {id(m): (m, m.__dict__.get("forward")) for m in (self.model, self.model.get_base_model())}
        for cell in self.spec.gated:
            self._guarded(cell, "gate", lambda cell=cell: self._gate(cell))
        for cell in () if self.spec.only_gate else self.spec.cells:
            kind = "sft" if cell == "long" else cell
            if kind in self.refused:
                self.say(cell=cell, state="red", note=self.refused[kind])
            elif cell == "long":
                self._long()
            else:
                self._guarded(
                    cell,
                    "cell",
                    lambda cell=cell: self.say(cell=cell, state="ok", **self._measure(cell, self.spec.seq)),
                )

    def _about(self) -> dict:
        from fastft.tools.bench.machine import about

        return about(self.spec, self.model)

    def _guarded(self, cell: str, part: str, do) -> bool:
        """Run; what it raises is a line. True if nothing was raised."""
        import torch

        try:
            do()
            return True
        except torch.OutOfMemoryError as e:
            state, note = "out of memory", str(e).split(". ")[0]
        except Exception as e:
            state, note = "error", f"{type(e).__name__}: {str(e)[:300]} | {traceback.format_exc()[-800:]}"
        finally:
            self._tidy()
        if part == "gate":
            self.refused[cell] = f"the gate did not run: {state}: {note}"
            self.say(gate=cell, state=state, note=note)
        else:
            self.say(cell=cell, state=state, note=note)
        return False

    def _tidy(self) -> None:
        """The model as it was loaded: each trainer adds a forward of its own to the instance, and moves the adapter."""
        import torch

        for module, forward in self.forwards.values():
            for name in ("forward", ORIGINAL_FORWARD):
                module.__dict__.pop(name, None)
            if forward is not None:
                module.__dict__["forward"] = forward
        for name in [n for n in self.model.peft_config if n not in self.adapters]:
            self.model.delete_adapter(name)  # DPO's reference, a copy of the adapter
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                p.grad = None
                if n in self.start:
                    p.copy_(self.start[n])
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- the gate

    def _gate(self, cell: str) -> None:
        """Losses and gradients of DRAWS batches, as the trainer's own steps leave them, written; and judged, but for
        stock and the reference."""
        from safetensors.torch import load_file, save_file

        from fastft.tools.bench.steps import losses_and_gradients
        from fastft.tools.gate import gate

        found = losses_and_gradients(self.spec, cell, self.model, self.tokenizer, DRAWS)
        path = lambda who: self.folder / f"gate-{cell}-{who}.safetensors"
        save_file(found, str(path(self.spec.stack)))
        if self.spec.stack in ("reference", "stock"):
            return
        if not (path("reference").exists() and path("stock").exists()):
            self.refused[cell] = "nothing to judge it by: the high-precision run or stock's failed"
            return
        verdict = gate(
            found, {k: v.double() for k, v in load_file(str(path("reference"))).items()}, load_file(str(path("stock")))
        )
        self.say(
            gate=cell,
            state="ok" if verdict else "red",
            error=verdict.error,
            stock_error=verdict.eager_error,
            note="" if verdict else str(verdict),
        )
        if not verdict:
            self.refused[cell] = str(verdict)

    # --- the cells

    def _measure(self, cell: str, seq: int, steps: int | None = None) -> dict:
        from fastft.tools.bench.steps import measure

        return measure(self.spec, cell, self.model, self.tokenizer, seq, steps or self.spec.steps, self._tidy)

    def _long(self) -> None:
        """One row, longer and longer: memory at every length, speed at the longest that fitted."""
        points, last = [], None

        def once(n: int) -> None:
            nonlocal last
            last = self._measure("long", n, max(2, self.spec.steps // 2)) | {"tokens": n}
            points.append({"tokens": n, "peak": last.get("peak")})

        for n in self.spec.lengths:
            if not self._guarded(f"long, {n} tokens", "cell", lambda n=n: once(n)):
                break
        if last is not None:
            self.say(cell="long", state="ok", **last, by_length=points)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
