"""The arithmetic of a group of adapted projections over one input, forward and backward, outside autograd.

    y_i  = x W_i^T + b_i + sum_a s_a (xA_a B_a^T + c_a)      xA_a = drop_a(x) A_a^T       a: the adapters of projection
         i
    dxA_a = s_a dy_i B_a       dB_a = s_a dy_i^T xA_a         dc_a = s_a sum_t dy_i
    dA_a = dxA_a^T drop_a(x)   dW_i = dy_i^T x                db_i = sum_t dy_i
    dx   = sum_i dy_i W_i + sum_a drop_a'(dxA_a A_a)

Launches: the A matrices are stacked, so xA, dA and dx's adapter part are one product each; an adapter's output is added
into y_i by the product itself; dx is one buffer. Matrices that need a cast are copied into one scratch buffer by one
launch, and where gradients need a cast as well the same buffer receives them, to be cast by one launch. The factor s is
applied to the float32 accumulator of a product, never to a stored activation, so that float16 does not overflow early.

Three dtypes: `compute` of the base products, `lora` of the adapters' (wider than compute where float32 adapters train
without
autocast: their gradients then carry float32's precision, as stock's do), `out` of y. What is kept for the backward
beside x: xA."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastft_kernels.lora import dropout
from fastft_kernels.lora.layout import AdapterSlot, GroupTensors, ProjectionSlot
from fastft_kernels.lora.plain_group import add_to, product, product_into, rows
from fastft_kernels.quant import scaled_product
from fastft_kernels.quant.weights import expand
from fastft_kernels.recompute.recomputation import Recomputation, take_rounded
from fastft_kernels.runtime.compat import copy_each, scale_each
from fastft_kernels.runtime.dispatch import goes_to_cuda, wider


class SavedProjections(NamedTuple):
    """What the forward leaves for the backward beside x and the parameters."""

    xA: torch.Tensor | None  # [T, sum of ranks]
    draws: tuple[dropout.State | int | None, ...]  # per adapter: a replayable state, an index into masks, or no dropout
    masks: tuple[torch.Tensor, ...]


@contextlib.contextmanager
def _autocast_off(kind: str):
    with torch.autocast(kind, enabled=False):
        yield


def exact_dtypes(x: torch.Tensor):
    """Context in which products run in the dtypes they are given, whatever autocast says."""
    kind = x.device.type
    return _autocast_off(kind) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def slots(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One uninitialised buffer and a matrix in it for each shape, each starting on 16 bytes where elements have 2."""
    starts, end = [], 0
    for m, n in shapes:
        starts.append(end)
        end += -(-m * n // 8) * 8
    flat = torch.empty(end, dtype=dtype, device=device)
    return flat, [flat[s : s + m * n].view(m, n) for s, (m, n) in zip(starts, shapes)]


def operands(
    As: list[torch.Tensor], a_dtype: torch.dtype, Bs: list[torch.Tensor], b_dtype: torch.dtype, stack: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
    """(A matrices in a_dtype: one, stacked, if `stack`; B matrices in b_dtype; the buffer of copies in b_dtype, or
    None)."""
    stack = stack and len(As) > 1
    if stack and all(A.dtype == a_dtype for A in As):
        As, stack = [torch.cat(As)], False
    scratch, jobs = None, {}
    if stack or any(A.dtype != a_dtype for A in As):
        jobs[a_dtype] = [("A", i) for i in range(len(As))]
    if any(B.dtype != b_dtype for B in Bs):
        jobs[b_dtype] = jobs.get(b_dtype, []) + [("B", i) for i in range(len(Bs))]
    As, Bs = list(As), list(Bs)
    for dtype, wanted in jobs.items():
        sources = [(As if kind == "A" else Bs)[i] for kind, i in wanted]
        if len(sources) == 1:
            copies = [sources[0].to(dtype)]
        else:
            n_stacked = len(As) if stack and dtype == a_dtype else 0
            shapes = [tuple(s.shape) for s in sources[n_stacked:]]
            if n_stacked:
                shapes.insert(0, (sum(A.shape[0] for A in As), As[0].shape[1]))
            flat, copies = slots(shapes, dtype, sources[0].device)
            if n_stacked:
                copies = [*copies[0].split([A.shape[0] for A in As]), *copies[1:]]
            copy_each(copies, sources)
            scratch = flat if dtype == b_dtype else scratch
            if n_stacked:
                As = [flat[: shapes[0][0] * shapes[0][1]].view(shapes[0])]
                wanted, copies = wanted[n_stacked:], copies[n_stacked:]
        for (kind, i), copy in zip(wanted, copies):
            (As if kind == "A" else Bs)[i] = copy
    return As, Bs, scratch


def add_product(
    total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, alpha: float = 1.0
) -> torch.Tensor:
    """total + alpha a b in `dtype`, in place; a b as a new matrix if total is None. a, b in `dtype` or narrower."""
    if total is not None and dtype == a.dtype:
        return add_to(total, a, b, alpha)
    ab = torch.mm(a, b, out_dtype=dtype) if _widens(a, dtype) else torch.mm(a, b)
    return ab.to(dtype) if total is None else total.add_(ab)


def forward(
    g: GroupTensors, t: Sequence[torch.Tensor], x: torch.Tensor, source: Recomputation | None = None
) -> tuple[list[torch.Tensor], SavedProjections]:
    """x [..., in] -> ([T, out_i] in g.out for every projection, what to keep). source: what else is known of x."""
    started = low_rank(g, t, x, source)
    return outputs(g, t, started), started.kept


class Started(NamedTuple):
    """A forward up to its base products: x [T, in] in the compute dtype, what to keep, every B in the dtype in which it
    joins y, and who may have rounded x to FP8 already."""

    xc: torch.Tensor
    kept: SavedProjections
    Bs: list[torch.Tensor]
    source: Recomputation | None = None


def low_rank(
    g: GroupTensors, t: Sequence[torch.Tensor], x: torch.Tensor, source: Recomputation | None = None
) -> Started:
    """All that the backward keeps of x [..., in]; no base product yet."""
    xc = rows(x).to(g.compute)
    source = source if x.dtype == g.compute else None  # what was rounded is x as it is multiplied
    adapters = g.adapters
    if not adapters:
        return Started(xc, SavedProjections(None, (), ()), [], source)
    dropped = any(a.p > 0 for a in adapters)
    As, Bs, _ = operands(
        [t[a.A] for a in adapters], g.lora, [t[a.B] for a in adapters], wider(g.compute, g.lora), stack=not dropped
    )
    if dropped:
        return Started(xc, SavedProjections(*_dropped_low_rank(g, t, x, As)), Bs, source)
    xA = torch.mm(xc if g.lora == g.compute else rows(x).to(g.lora), As[0].t())
    return Started(xc, SavedProjections(xA, (None,) * len(adapters), ()), Bs, source)


def outputs(g: GroupTensors, t: Sequence[torch.Tensor], started: Started) -> list[torch.Tensor]:
    """[T, out_i] in g.out for every projection."""
    xc, kept, Bs, source = started
    add = g.compute if kept.xA is None else wider(g.compute, g.lora)  # the dtype in which an adapter's output joins y
    ys, done, joined = [], 0, None if kept.xA is None else kept.xA.to(add)
    in_fp8 = [scaled_product.applies(p.layout, g.compute, xc) for p in g.projections]
    rounded = None
    if True in in_fp8:
        left = take_rounded(source)
        rounded = scaled_product.quantized(xc) if left is None else scaled_product.Quantized(*left)
    for p, fp8 in zip(g.projections, in_fp8):
        y, late = base(g, p, t, xc, add, rounded if fp8 else None)
        for a, B in zip(p.adapters, Bs[done : done + len(p.adapters)]):
            add_product(y, joined[:, a.column : a.column + a.rank], B.t(), add, a.scaling)
        for a in late:
            y.add_(t[a.bias], alpha=a.scaling)
        done += len(p.adapters)
        ys.append(y.to(g.out))
    return ys


def base(
    g: GroupTensors,
    p: ProjectionSlot,
    t: Sequence[torch.Tensor],
    xc: torch.Tensor,
    add: torch.dtype,
    rounded: scaled_product.Quantized | None = None,
):
    """(x W^T + biases in the dtype `add`, the adapters whose bias is still to be added). rounded: x in FP8, where W's
    product is one of FP8 matrices."""
    weight = t[p.weight : p.weight + p.n_weight]
    bias = t[p.bias] if p.bias >= 0 else None
    biased = [a for a in p.adapters if a.bias >= 0]
    late = biased if add != g.compute else []
    if biased and not late:
        wide = wider(g.compute, torch.float32)
        total = torch.zeros_like(t[biased[0].bias], dtype=wide) if bias is None else bias.to(wide)
        for a in biased:
            total = torch.add(total, t[a.bias], alpha=a.scaling)
        bias = total
    if rounded is not None:
        y = scaled_product.product(rounded, *weight, g.compute)
        y = y if bias is None else y.add_(bias.to(g.compute))
    else:
        W = expand(p.layout, weight, g.compute).t()
        y = torch.mm(xc, W) if bias is None else torch.addmm(bias.to(g.compute), xc, W)
    return y.to(add), late


def _dropped_low_rank(g: GroupTensors, t: Sequence[torch.Tensor], x: torch.Tensor, As: list[torch.Tensor]):
    """xA where some adapters drop out: each has an input of its own, drawn in order, in the adapter's dtype as stock
    draws it."""
    adapters, draws, masks, xl = g.adapters, [], [], rows(x).to(g.lora)
    xA = torch.empty(xl.shape[0], g.rank, dtype=g.lora, device=x.device)
    for a, A in zip(adapters, As):
        source, state, factor = xl, None, 1.0
        if a.p > 0:
            state = dropout.capture(x.device) if x.is_contiguous() else None
            mask = dropout.draw_mask(x, g.drawn or t[a.A].dtype, a.p)
            source, factor = xl * rows(mask), dropout.factor(a.p)
            if state is None:
                state = len(masks)
                masks.append(mask)
        product_into(xA[:, a.column : a.column + a.rank], source, A.t(), factor)
        draws.append(state)
    return xA, tuple(draws), tuple(masks)


class Backward:
    """One backward of a group. `input_gradient` first, then `parameter_gradients`, which is the first to need x.

    t: the group's tensors; needs: which of them want a gradient; dys: [..., out_i] or None; shape: x's shape.
    """

    def __init__(
        self,
        g: GroupTensors,
        t: Sequence[torch.Tensor],
        needs: Sequence[bool],
        kept: SavedProjections,
        dys,
        shape: torch.Size,
    ):
        self.g, self.t, self.needs, self.kept, self.shape = g, t, needs, kept, shape
        self.live = [(p, rows(dy)) for p, dy in zip(g.projections, dys) if dy is not None]
        self.adapters = [(a, i) for i, (p, _) in enumerate(self.live) for a in p.adapters]
        self.draws = dict(zip([a.A for a in g.adapters], kept.draws))
        self.columns, width = [], 0  # of each live adapter in dxA
        for a, _ in self.adapters:
            self.columns.append(slice(width, width + a.rank))
            width += a.rank
        self.width = width
        self.dxA = self.scratch = None
        self.masks: dict[int, torch.Tensor] = {}
        self._casts: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def _dy(self, i: int, dtype: torch.dtype) -> torch.Tensor:
        dy = self.live[i][1]
        if dy.dtype == dtype:
            return dy
        if (i, dtype) not in self._casts:
            self._casts[i, dtype] = dy.to(dtype)
        return self._casts[i, dtype]

    def input_gradient(self, want: bool, dtype: torch.dtype) -> torch.Tensor | None:
        """dx [T, in] in `dtype` if it is wanted; prepares dxA for the parameters' gradients either way."""
        g, t, dx = self.g, self.t, None
        total = wider(dtype, g.compute)  # a float32 dx of half-precision products is summed in float32, as stock's is,
        total = wider(total, g.lora) if self.adapters else total  # and so is one to which float32 adapters add
        add = g.lora if total == g.lora else g.compute
        dropped = any(a.p > 0 for a, _ in self.adapters)
        As = []
        if self.adapters and (want or any(self.needs[a.A] for a, _ in self.adapters)):
            sources = [t[a.A] for a, _ in self.adapters] if want else []
            As, Bs, self.scratch = operands(sources, add, [t[a.B] for a, _ in self.adapters], g.lora, stack=not dropped)
            self._low_rank_gradient(Bs)
        if not want:
            return None
        for i, (p, _) in enumerate(self.live):
            dy, weight = self._dy(i, g.compute), t[p.weight : p.weight + p.n_weight]
            if scaled_product.applies(p.layout, g.compute, dy, backward=True):
                part = scaled_product.input_gradient(dy, *weight, g.compute, p.layout.options[2])
                dx = part.to(total) if dx is None else dx.add_(part)
                continue
            W = expand(p.layout, weight, g.compute)
            dx = add_product(dx, dy, W, total)
            del W
        if As:
            dxA = self.dxA.to(add)
            if not dropped:
                dx = add_product(dx, dxA, As[0], total)
            else:
                for (a, _), c, A in zip(self.adapters, self.columns, As):
                    self._add_dropped(dx, a, dxA[:, c], A)
        return dx.to(dtype)

    def _low_rank_gradient(self, Bs: list[torch.Tensor]) -> None:
        g = self.g
        if len(Bs) == 1:
            ((a, i),) = self.adapters
            self.dxA = product(self._dy(i, g.lora), Bs[0], a.scaling)
            return
        self.dxA = torch.empty(self.live[0][1].shape[0], self.width, dtype=g.lora, device=Bs[0].device)
        for (a, i), c, B in zip(self.adapters, self.columns, Bs):
            product_into(self.dxA[:, c], self._dy(i, g.lora), B, a.scaling)

    def _add_dropped(self, dx: torch.Tensor, a: AdapterSlot, dxA: torch.Tensor, A: torch.Tensor) -> None:
        """dx += drop'(dxA A)"""
        if a.p == 0:
            add_product(dx, dxA, A, dx.dtype)
            return
        dx.addcmul_(torch.mm(dxA, A), self._mask(a, dx), value=dropout.factor(a.p))

    def _mask(self, a: AdapterSlot, like: torch.Tensor) -> torch.Tensor:
        """The forward's mask [T, in]: kept, or drawn again (once a backward). like: any tensor of x's size on its
        device."""
        draw = self.draws[a.A]
        if isinstance(draw, int):
            return rows(self.kept.masks[draw])
        if a.A not in self.masks:
            self.masks[a.A] = rows(
                dropout.draw_mask(like.view(self.shape), self.g.drawn or self.t[a.A].dtype, a.p, draw)
            )
        return self.masks[a.A]

    def parameter_gradients(self, x: torch.Tensor | None) -> list[torch.Tensor | None]:
        """The gradient of each of the group's tensors that wants one, None elsewhere. x [..., in]; None if not
        needed."""
        g, t, needs, grads = self.g, self.t, self.needs, [None] * len(self.needs)
        jobs: list[Job] = []
        wide, xc = self._cast_input(x)
        run: list[
            AdapterSlot
        ] = []  # adapters that share one product: neighbours of one dtype, all wanted, without dropout
        for (a, _), c in zip(self.adapters, self.columns):
            if needs[a.A] and a.p == 0:
                run = jobs.pop().targets if run and t[run[-1].A].dtype == t[a.A].dtype else []
                run.append(a)
                first = c.stop - sum(r.rank for r in run)
                jobs.append(Job(run, self.dxA[:, first : c.stop], wide, 1.0, self.t[a.A].dtype))
            else:
                run = []
                if needs[a.A]:
                    dropped = rows(x).to(g.lora) * self._mask(a, x)
                    jobs.append(Job([a], self.dxA[:, c], dropped, dropout.factor(a.p), self.t[a.A].dtype))
        for a, i in self.adapters:
            if needs[a.B]:
                xA = self.kept.xA[:, a.column : a.column + a.rank]
                jobs.append(Job([a.B], self._dy(i, g.lora), xA, a.scaling, self.t[a.B].dtype))
        for i, (p, dy) in enumerate(self.live):
            if needs[p.weight]:
                jobs.append(Job([p.weight], self._dy(i, g.compute), xc, 1.0, self.t[p.weight].dtype))
            self._bias_gradients(p, dy, grads)
        for job, grad in zip(jobs, multiply(jobs, self.scratch)):
            if isinstance(job.targets[0], int):
                grads[job.targets[0]] = grad
            else:
                for a, dA in zip(job.targets, grad.split([a.rank for a in job.targets])):
                    grads[a.A] = dA
        return grads

    def _cast_input(self, x: torch.Tensor | None):
        """x [T, in] in the dtypes of the adapters' and of the base's products, each only if something needs it."""
        if x is None:
            return None, None
        x, wide, xc = rows(x), None, None
        if any(self.needs[a.A] and a.p == 0 for a, _ in self.adapters):
            wide = x.to(self.g.lora)
        if any(self.needs[p.weight] for p, _ in self.live):
            xc = wide if wide is not None and self.g.lora == self.g.compute else x.to(self.g.compute)
        return wide, xc

    def _bias_gradients(self, p: ProjectionSlot, dy: torch.Tensor, grads: list) -> None:
        places = [(p.bias, 1.0)] + [(a.bias, a.scaling) for a in p.adapters]
        for index, scaling in places:
            if index >= 0 and self.needs[index]:
                db = dy.sum(0, dtype=wider(dy.dtype, torch.float32))
                grads[index] = (db if scaling == 1.0 else db.mul_(scaling)).to(self.t[index].dtype)


class Job(NamedTuple):
    """A gradient alpha a^T b [m, n] wanted in `dtype`. targets: [index of a tensor], or the adapters whose dA are its
    rows."""

    targets: list
    a: torch.Tensor  # [T, m]
    b: torch.Tensor  # [T, n]
    alpha: float
    dtype: torch.dtype


def multiply(jobs: list[Job], scratch: torch.Tensor | None) -> list[torch.Tensor]:
    """The products, each in its dtype. `scratch`: a buffer that nobody reads any more; may be overwritten."""
    grads: list[torch.Tensor | None] = [None] * len(jobs)
    pooled: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    scaled: list[int] = []
    for n, job in enumerate(jobs):
        if job.a.dtype == job.dtype:
            grads[n] = product(job.a.t(), job.b, job.alpha)
        elif _widens(job.a, job.dtype):
            grads[n] = torch.mm(job.a.t(), job.b, out_dtype=job.dtype)
            scaled += [n] if job.alpha != 1.0 else []
        else:
            pooled.setdefault((job.a.dtype, job.dtype), []).append(n)
    if scaled:
        scale_each([grads[n] for n in scaled], [jobs[n].alpha for n in scaled])
    for (source, dtype), members in pooled.items():
        if len(members) == 1:
            job = jobs[members[0]]
            grads[members[0]] = product(job.a.t(), job.b, job.alpha).to(dtype)
            continue
        shapes = [(jobs[n].a.shape[1], jobs[n].b.shape[1]) for n in members]
        flat, cast = _pool(shapes, source, jobs[members[0]].a.device, scratch)
        for n, out in zip(members, cast):
            product_into(out, jobs[n].a.t(), jobs[n].b, jobs[n].alpha)
        start, wide = 0, flat.to(dtype)
        for n, (m, k) in zip(members, shapes):
            grads[n] = wide[start : start + m * k].view(m, k)
            start += -(-m * k // 8) * 8
    return grads


def _pool(shapes, dtype: torch.dtype, device: torch.device, scratch: torch.Tensor | None):
    size = sum(-(-m * n // 8) * 8 for m, n in shapes)
    if scratch is None or scratch.dtype != dtype or scratch.numel() < size:
        return slots(shapes, dtype, device)
    flat, views, start = scratch[:size], [], 0
    for m, n in shapes:
        views.append(flat[start : start + m * n].view(m, n))
        start += -(-m * n // 8) * 8
    return flat, views


def _widens(a: torch.Tensor, dtype: torch.dtype) -> bool:
    """Can a product of half-precision matrices leave its float32 accumulator unrounded?"""
    return (
        goes_to_cuda(a)
        and torch.version.hip is None
        and dtype == torch.float32
        and a.dtype in (torch.float16, torch.bfloat16)
    )
