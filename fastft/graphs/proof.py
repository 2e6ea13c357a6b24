"""A capture is proven on the batch that it was made with, before its first replay counts.

The layer runs eagerly twice on the user's own tensors, with drawn gradients of its outputs. Results whose bits agree
between these two runs must have those bits in the replay; a result that already differs between them (an attention
kernel's backward that does not repeat itself) may differ in the replay by no more than twice that, and is named. Two
runs of what does not repeat itself agree now and then: before a replay is refused, the layer runs eagerly up to
MOST_RUNS times, and the largest difference between any of them and the first counts. Two replays are compared, with
garbage in the static buffers before each, and the first one's results once more after the second: so a buffer that is
not filled, and a result that lies in static memory, are seen.

Random state, module attributes, buffers and `.grad` are what they were; a layer that changes any of them in a call is
not captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastft.graphs.captured import Captured, Found, Tensors
from fastft.graphs.signature import LayerState

FACTOR = 2.0
MOST_RUNS = 6


@dataclass(frozen=True)
class Findings:
    """reason: empty where the replay is proven. loose: the results that did not repeat themselves in eager runs."""

    reason: str = ""
    loose: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.reason


def drawn(outputs: Tensors) -> Tensors:
    """Gradients for `outputs`: the same normal numbers each time, from a generator of their own."""
    found = []
    for t in outputs:
        generator = torch.Generator(t.device).manual_seed(len(found))
        g = torch.empty_like(t.detach(), requires_grad=False)
        found.append(g.normal_(generator=generator))
    return found


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Are both the same bits (or both None)? NaNs of the same bits are equal."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.stride() != b.stride():
        return False
    flat = [t.contiguous().view(-1) for t in (a, b)]
    return torch.equal(*(t.view(torch.uint8) if t.numel() else t for t in flat))


def judge(name: str, runs: Found, replayed: torch.Tensor | None) -> Findings:
    """One result: of the eager runs, two or more, and of the replay."""
    first = runs[0]
    if first is None or replayed is None or any(t is None for t in runs):
        missing = first is None and replayed is None and all(t is None for t in runs)
        return Findings() if missing else Findings(f"{name} is missing on one side")
    if all(same_bits(first, t) for t in runs[1:]):
        return Findings() if same_bits(first, replayed) else Findings(f"{name} has other bits in the replay")
    if not first.is_floating_point() or replayed.shape != first.shape or replayed.dtype != first.dtype:
        return Findings(f"{name} differs")
    exact = first.double()
    apart = [float((t.double() - exact).abs().max()) for t in (*runs[1:], replayed) if t is not None]
    theirs, ours = max(apart[:-1]), apart[-1]
    if ours <= FACTOR * theirs:  # (a NaN is not)
        return Findings(loose=(name,))
    return Findings(f"{name} differs by {ours:.2e} in the replay, {len(runs)} eager runs by {theirs:.2e}")


def _judge_all(names: Sequence[str], eager: Sequence[Found], replays: Sequence[Found]) -> Findings:
    loose: dict[str, None] = {}
    for results in replays:
        for name, ours, *runs in zip(names, results, *eager):
            found = judge(name, runs, ours)
            if not found.ok:
                return found
            loose.update(dict.fromkeys(found.loose))
    return Findings(loose=tuple(loose))


def random_states(device: torch.device) -> list[torch.Tensor]:
    """The states of the generators that a layer on `device` may draw from."""
    found = [torch.get_rng_state()]
    if device.type in ("cuda", "xpu"):
        found.append(torch.get_device_module(device).get_rng_state(device))
    return found


def _set_random_states(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


def _scramble(captured: Captured) -> None:
    """Garbage where a replay reads what it is given."""
    for static, buffer in zip(captured.statics, captured.shared):
        if buffer is None or not buffer.is_read():
            _garbage(static)
            if buffer is not None:
                buffer.turn = -1
    for static in (*captured.upstream, *captured.outputs, *captured.gradients):
        _garbage(static)


def _garbage(static: torch.Tensor) -> None:
    whole = static.detach()
    for d, stride in enumerate(whole.stride()):
        if stride == 0 and whole.shape[d] > 1:
            whole = whole.narrow(d, 0, 1)
    whole.fill_(float("nan") if whole.is_floating_point() else 0)


def _aliases(captured: Captured, results: Sequence[torch.Tensor | None]) -> bool:
    static = {
        t.untyped_storage().data_ptr()
        for t in (*captured.statics, *captured.outputs, *captured.upstream, *captured.gradients)
        if t.numel()
    }
    return any(t is not None and t.numel() and t.untyped_storage().data_ptr() in static for t in results)


def prove(captured: Captured, layer: nn.Module, tensors: Sequence[torch.Tensor], turn: int) -> Findings:
    """Capture, and compare. tensors: the call's. Errors of the capture pass through; the states of the random
    generators are then set back all the same."""
    before, buffers = LayerState(layer), [(b, b.clone()) for b in layer.buffers()]
    states = random_states(captured.device)
    try:
        return _prove(captured, layer, tensors, turn, states, before, buffers)
    finally:
        _set_random_states(captured.device, states)
        for buffer, was in buffers:
            if not same_bits(buffer.detach(), was.detach()):
                buffer.detach().copy_(was)


def _prove(captured: Captured, layer: nn.Module, tensors, turn: int, states, before: LayerState, buffers) -> Findings:
    versions = before.versions()
    eager: list[Found] = []
    outputs: Tensors = []
    found: Found = []
    for _ in range(2):
        outputs, found = captured.recorder.rehearse(lambda: captured.eager(tensors, drawn))
        eager.append([*outputs, *found])
        if any(not torch.equal(a, b) for a, b in zip(states, random_states(captured.device))):
            return Findings("a layer draws random numbers (dropout)")
        if not before.matches(layer):
            return Findings("a layer changes its attributes or its modules in a call")
        if before.versions() != versions or any(not same_bits(b.detach(), was.detach()) for b, was in buffers):
            return Findings("a layer changes its buffers or parameters in a call")
    if not any(captured.learns):
        return Findings("a layer's output has no gradient")
    captured.prepare(outputs, found)
    captured.load(tensors, turn)
    captured.capture()
    names = [f"output {i}" for i in range(len(outputs))] + captured.names
    upstream = drawn([t for t, learns in zip(outputs, captured.learns) if learns])
    replays: list[Found] = []
    for _ in range(2):
        _scramble(captured)
        captured.load(tensors, turn)
        results: Found = [*captured.forward(), *captured.backward(upstream)]
        if _aliases(captured, results):
            return Findings("a result lies in static memory")
        replays.append(results)
    verdict = _judge_all(names, eager, replays)
    while not verdict.ok and len(eager) < MOST_RUNS:
        outputs, found = captured.recorder.rehearse(lambda: captured.eager(tensors, drawn))
        eager.append([*outputs, *found])
        verdict = _judge_all(names, eager, replays)
    return verdict
