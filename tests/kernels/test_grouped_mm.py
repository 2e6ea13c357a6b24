"""Grouped products against a float64 loop: empty groups, rows past the last end, strides, widths that are no multiple
of 16 bytes; torch's own kernel under the same padding, which a CPU runs in bfloat16 too."""

import pytest
import torch

from fastft_kernels.experts import grouped_mm as module
from fastft_kernels.experts.grouped_mm import Groups, grouped_mm, grouped_mm_t, grouped_outer, grouped_sum
from fastft_kernels.numerics import compare

COUNTS = {
    "some empty": [3, 0, 5, 1, 0],
    "first and last": [4, 0, 0, 0, 5],
    "all in one": [0, 9, 0, 0, 0],
    "none": [0] * 5,
}


def ends_of(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def spans(ends):
    stops = ends.tolist()
    return list(zip([0, *stops], stops))


def draw(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=["loop", "torch's kernel"])
def way(request, monkeypatch):
    """torch's kernel leaves rows unwritten and wants 16 bytes: here it runs where a CPU has it."""
    if request.param == "torch's kernel":
        monkeypatch.setattr(module, "native", lambda like, dtype: dtype != torch.float64)
    return request.param


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("k", "n"), [(16, 24), (13, 7), (1, 3)])
@pytest.mark.parametrize("turned", [False, True])
def test_products(way, dtype, counts, k, n, turned):
    ends = ends_of(counts)
    rows = 11  # past the last end, too
    x = draw(rows, k, dtype=dtype)
    w = draw(5, n, k, dtype=dtype, seed=1).transpose(1, 2) if turned else draw(5, k, n, dtype=dtype, seed=1)
    y = draw(rows, n, dtype=dtype, seed=2)
    groups = Groups(ends, whole=False)
    for ours, formula, shape in (
        (grouped_mm(x, w, groups), lambda e, a, b, d: x[a:b].to(d) @ w[e].to(d), (rows, n)),
        (grouped_mm_t(x, y, groups), lambda e, a, b, d: x[a:b].to(d).t() @ y[a:b].to(d), (5, k, n)),
    ):
        whole = {d: torch.zeros(shape, dtype=d) for d in (torch.float64, dtype)}
        for d, to in whole.items():
            for e, (a, b) in enumerate(spans(ends)):
                if b > a:
                    to[slice(a, b) if len(shape) == 2 else e] = formula(e, a, b, d)
        assert ours.shape == shape and ours.is_contiguous()
        assert compare({"y": ours}, {"y": whole[torch.float64]}, {"y": whole[dtype]})


def test_expanded_and_sliced_operands(way, dtype):
    """What autograd hands back: a gradient expanded from one number, a slice of a wider tensor. Whole numbers: exact in
    any order of summation."""
    groups = Groups(ends_of([2, 0, 4]))
    x, w = draw(6, 32, dtype=dtype).round()[:, 3:19], draw(3, 16, 8, dtype=dtype, seed=1).round()
    ones = torch.ones((), dtype=dtype).expand(6, 8)
    assert torch.equal(grouped_mm(x, w, groups), grouped_mm(x.contiguous(), w, groups))
    assert torch.equal(grouped_mm_t(x, ones, groups), grouped_mm_t(x.contiguous(), ones.contiguous(), groups))
    assert torch.equal(grouped_mm(ones, w.transpose(1, 2), groups), grouped_mm(ones.clone(), w.mT.contiguous(), groups))


@pytest.mark.parametrize("scaled", [False, True])
def test_thin_sums(way, dtype, scaled):
    """Sums of a few columns: no worse than rounding the product with scale first."""
    ends = ends_of([7, 0, 30, 3])
    thin, wide = draw(40, 3, dtype=dtype), draw(40, 20, dtype=dtype, seed=1)
    scale = draw(40, 1, dtype=torch.float32, seed=2) if scaled else None
    groups = Groups(ends)
    found = {"outer": grouped_outer(thin, scale, wide, groups), "sum": grouped_sum(wide, scale, groups).float()}

    def loop(d):
        s = torch.ones(40, 1, dtype=d) if scale is None else scale.to(d)
        outer, total = torch.zeros(4, 3, 20, dtype=d), torch.zeros(4, 20, dtype=d)
        for e, (a, b) in enumerate(spans(ends)):
            outer[e] = (thin[a:b].to(d) * s[a:b]).t() @ wide[a:b].to(d)
            total[e] = (wide[a:b].to(d) * s[a:b]).sum(0)
        return {"outer": outer, "sum": total}

    eager = {n: v.float() for n, v in loop(dtype).items()}
    verdict = compare(found, loop(torch.float64), eager)
    if dtype != torch.float32:
        assert verdict, str(verdict)
    else:  # in float32 one order of summation is a draw beside another
        assert verdict.error < 16 * torch.finfo(dtype).eps


def test_the_same_bits_twice(way, dtype):
    groups = Groups(ends_of([5, 9, 0, 3]))
    x, w = draw(17, 16, dtype=dtype), draw(4, 16, 8, dtype=dtype, seed=1)
    assert torch.equal(grouped_mm(x, w, groups), grouped_mm(x, w, groups))
    assert torch.equal(grouped_mm_t(x, x, groups), grouped_mm_t(x, x, groups))


def test_ends_are_read_once(monkeypatch):
    """Where products run one by one, `Groups.of` has read the ends, and nothing reads them again."""
    groups = Groups.of(ends_of([2, 3]), torch.float32)
    assert groups.host == [2, 5]
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("read again"))
    grouped_mm(draw(5, 4, dtype=torch.float32), draw(2, 4, 4, dtype=torch.float32), groups)


@pytest.mark.parametrize(
    ("x", "w"), [((5, 4), (2, 3, 4)), ((5, 4, 1), (2, 4, 4)), ((5, 4), (3, 4, 4))], ids=["width", "dims", "groups"]
)
def test_refused(x, w):
    with pytest.raises(ValueError, match="grouped_mm: want"):
        grouped_mm(torch.ones(x), torch.ones(w), Groups(ends_of([2, 3])))
