"""Where the graphs stand on a model: a mixin on each layer that transformers can checkpoint, and its exact undo."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fastft.checkpointing.layer_stack import GRAPHS, stacks
from fastft.errors import GraphsError
from fastft.graphs.layer import GraphedLayer, LayerGraphs
from fastft.graphs.recorder import CudaRecorder, Recorder, cuda_obstacle
from fastft.graphs.stack import StackGraphs
from fastft.patching.patcher import record_of
from fastft.swapping.swap import install, is_fast, obstacle, state_of, swapped_in, uninstall

AUTO = "auto"


def check(setting: object) -> None:
    """Raise GraphsError unless `setting` is True, False, "auto" or None."""
    if setting is not None and not isinstance(setting, bool) and setting != AUTO:
        raise GraphsError(f"cuda_graphs={setting!r}: want 'auto', True or False")


def attach(base: nn.Module, setting: bool | str | None = None, recorder: Recorder | None = None) -> None:
    """Put the layers of a patched model under graphs, as `setting` says: True; "auto", where its parameters are on a
    CUDA device that can; False, not at all; None, as it was set before ("auto" at first). recorder: what captures, in
    the place of CUDA's. Layers that carry the swap already keep it. Raises GraphsError for another setting."""
    check(setting)
    record = record_of(base)
    if record is None:
        return
    record.cuda_graphs = record.cuda_graphs if setting is None else setting
    device = next((p.device for p in base.parameters() if p.device.type != "meta"), None)
    on = record.cuda_graphs is True
    if record.cuda_graphs == AUTO:
        on = device is not None and (recorder is not None or not cuda_obstacle(device))
    if not on:
        release(base)
        return
    for stack in stacks(base):
        layers = stack.alive()
        here = [m for m in layers if is_fast(m, GRAPHS)]
        if here and recorder is None:
            graphs = state_of(here[0], GRAPHS).stack
        else:
            graphs = StackGraphs(stack.owner, recorder or CudaRecorder(), record.cuda_graphs is True)
        for index, layer in enumerate(layers):
            if (layer in here and recorder is None) or obstacle(layer):
                continue
            install(layer, GRAPHS, GraphedLayer, LayerGraphs(graphs, index))


def renew(base: nn.Module) -> None:
    """Drop what was captured and look at the device again, as the model has moved."""
    release(base)
    attach(base)


def release(base: nn.Module) -> None:
    """Undo `attach` exactly."""
    for module in swapped_in(base):
        if is_fast(module, GRAPHS):
            uninstall(module, GRAPHS)


def _all(base: nn.Module) -> Iterator[LayerGraphs]:
    for module in swapped_in(base):
        if is_fast(module, GRAPHS):
            yield state_of(module, GRAPHS)


def lines(base: nn.Module) -> list[str]:
    """For the report: what was captured and replayed, and why calls ran eagerly."""
    by_stack: dict[int, list[LayerGraphs]] = {}
    for graphs in _all(base):
        by_stack.setdefault(id(graphs.stack), []).append(graphs)
    found = [line for layers in by_stack.values() for line in layers[0].stack.lines(len(layers))]
    record = record_of(base)
    if record is not None and record.cuda_graphs is True:
        device = next((p.device for p in base.parameters() if p.device.type != "meta"), None)
        first = next(_all(base), None)
        if first is not None and device is not None and (why := first.stack.recorder.obstacle(device)):
            found.append(f"CUDA graphs were asked for: {why}")
    return found
