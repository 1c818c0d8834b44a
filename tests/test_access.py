"""Which elements of a leaf are read, and how the axes of leaf and result belong together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from fusion_passes.access import Access, Atom, AxisMap, factor_axes, trace_access
from fusion_passes.sizes import Sizes, Unsupported, assignments
from fusion_passes.views import ravel, unravel
from tests import tracing

Function = Callable[..., Any]


def traced(
    function: Function, *shapes: tuple[int, ...], symbolic: bool = False, decompose: bool = True
) -> tuple[Node, list[Node], list[Sizes]]:
    inputs = [torch.zeros(s) for s in shapes]
    module = tracing.trace(function, *inputs, symbolic=symbolic, decompose=decompose)
    return tracing.result(module), tracing.placeholders(module.graph), assignments(module.graph)


def everywhere(root: Node, leaf: Node, sizes: Sizes, **kwargs: Any) -> Access:
    shape = sizes.shape(root)
    return trace_access(root, leaf, unravel(torch.arange(sizes.numel(root)), shape), sizes, **kwargs)


def read_by(function: Function, shapes: list[tuple[int, ...]], which: int) -> tuple[Tensor, Tensor]:
    """What each element of the result depends on, found by differentiation: the leaf element, and whether any."""
    inputs = [torch.rand(s, dtype=torch.float64) + 1 for s in shapes]
    before, after = inputs[:which], inputs[which + 1 :]
    jacobian = torch.autograd.functional.jacobian(lambda x: function(*before, x, *after), inputs[which])
    flat = jacobian.reshape(-1, inputs[which].numel()) != 0
    assert flat.sum(1).max() <= 1
    return flat.long().argmax(1), flat.any(1)


TRACED: dict[str, tuple[Function, list[tuple[int, ...]]]] = {
    "views": (lambda x: x.permute(2, 0, 1).reshape(4, -1)[:, 1:].flip(0), [(2, 3, 4)]),
    "broadcast": (lambda x, y: (x * y[:, None]).exp(), [(2, 1, 4), (2, 3)[:1] + (4,)]),
    "scalar": (lambda x, y: x + y, [(3,), ()]),
    "rank 0": (lambda x: x * 2, [()]),
    "pad": (lambda x: F.pad(x, (1, 2)).reshape(-1, 4) * 3, [(3, 5)]),
    "two paths to the same place": (lambda x: torch.where(x > 1.5, x, x.exp() + x), [(3, 5)]),
    "two paths with different pads": (lambda x: F.pad(x[1:], (0, 0, 1, 0)) + F.pad(x[:-1], (0, 0, 0, 1)), [(4, 3)]),
    "casts and copies": (lambda x: x.clone().to(torch.float64).contiguous() * x.detach().size(0), [(3, 5)]),
    "cat": (lambda x, y: torch.cat([x, y * 2, x.sin()], 1), [(2, 3), (2, 2)]),
    "cat as a pad": (lambda x: torch.cat([x, x.new_zeros(2, 2)], 1), [(2, 3)]),
    "stack": (lambda x, y: torch.stack([y, x, y], -1), [(2, 3), (2, 3)]),
    "triangle": (lambda x: x.tril(-1).transpose(0, 1) + 1, [(4, 4)]),
    "split": (lambda x: x.split([1, 3], 1)[1] * 2, [(2, 4)]),
    "log sigmoid": (lambda x: F.logsigmoid(x.t()), [(2, 4)]),
    "built by a copy": (lambda x: torch.empty(2, 3, 4, dtype=x.dtype).copy_(x) * 2, [(3, 1)]),
}


# masks of `where` do not hide what it reads, so tril is only followed as such
@pytest.mark.parametrize(("name", "decompose"), [(name, name != "triangle") for name in TRACED])
def test_access_is_what_the_derivative_says(name: str, decompose: bool) -> None:
    function, shapes = TRACED[name]
    root, leaves, (sizes,) = traced(function, *shapes, decompose=decompose)
    for which, leaf in enumerate(leaves):
        expected, reads = read_by(function, shapes, which)
        access = everywhere(root, leaf, sizes)
        assert torch.equal(access.valid, reads)
        index = ravel(access.coords, sizes.shape(leaf)).expand(reads.shape)
        assert torch.equal(index[reads], expected[reads])


def _shifted_sum(x: Tensor) -> Tensor:
    for shift in range(9):
        x = x + x.roll(shift)
    return x


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x + x.t(), "x_1 is read at two different places"),
        (lambda x: torch.cat([x, x], 1)[:, 1:4] + x, "x_1 is read at two different places"),
        (lambda x: x.cumsum(0) + x, "x_1 is read through cumsum.* .aten.cumsum.default."),
        (lambda x: x.topk(2)[0] * 2, "x_1 is read through topk"),
        (lambda x: torch.zeros_like(x) + x.size(0), "does not read x_1"),
        (lambda x: torch.ops.aten.copy(x * 2, torch.ones(3, 3)), "does not read x_1"),
        (lambda x: torch.stack([x.roll(i) for i in range(9)]).sin()[:, 0] + x[1], "x_1 is read at two different"),
        (lambda x: _shifted_sum(x[:, 0].expand(3, 3) * 2), "add.* is read at more than 8 different places"),
    ],
)
def test_refusals(function: Function, message: str) -> None:
    root, (leaf,), (sizes,) = traced(lambda x: function(x), (3, 3), decompose=False)
    with pytest.raises(Unsupported, match=message):
        everywhere(root, leaf, sizes)


def test_only_the_given_targets_are_followed() -> None:
    root, (leaf,), (sizes,) = traced(lambda x: x.exp().t(), (3, 4))
    with pytest.raises(Unsupported, match="exp"):
        everywhere(root, leaf, sizes, through={torch.ops.aten.permute.default, torch.ops.aten.t.default})


def test_other_leaves_are_not_looked_into() -> None:
    def function(x: Tensor) -> Tensor:
        return x * x.cumsum(0).sin()

    module = tracing.trace(function, torch.zeros(3, 4))
    (leaf,), root = tracing.placeholders(module.graph), tracing.result(module)
    other = next(n for n in module.graph.nodes if n.target is torch.ops.aten.cumsum.default)
    coords = unravel(torch.arange(12), (3, 4))
    with pytest.raises(Unsupported, match="cumsum"):
        trace_access(root, leaf, coords, Sizes())
    access = trace_access(root, leaf, coords, Sizes(), stop=[other])
    assert all(torch.equal(a, b) for a, b in zip(access.coords, coords)) and access.valid.all()


def test_many_paths_are_walked_once() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(200):  # 2 ** 200 paths
            x = x * x.exp()
        return x.t()

    root, (leaf,), (sizes,) = traced(function, (3, 4))
    access = everywhere(root, leaf, sizes)
    assert access.valid.all() and access.coords[0].tolist() == [0, 1, 2] * 4


def test_under_a_fake_mode() -> None:
    root, (leaf,), (sizes,) = traced(lambda x: F.pad(x, (0, 1)).t() * 2, (3, 4))
    coords = unravel(torch.arange(15), (5, 3))
    with FakeTensorMode():
        access = trace_access(root, leaf, coords, sizes)
        found = factor_axes(root, leaf, sizes)
    assert type(access.valid) is Tensor and access.valid.tolist() == [i < 12 for i in range(15)]
    assert [axis.terms for axis in found.axes] == [((1, 1),), ((0, 1),)]


# ---------------------------------------------------------------- axes


def axes_of(found: AxisMap) -> list[list[tuple[int, int, int, int]]]:
    """Per leaf axis: (root axis, size, root stride, coefficient) of every term."""
    atoms = found.atoms
    terms = [[(atoms[i], c) for i, c in axis.terms] for axis in found.axes]
    return [[(a.root_axis, a.size, a.root_stride, c) for a, c in leaf_axis] for leaf_axis in terms]


def chunked(x: Tensor, chunk: int = 8) -> Tensor:
    """[B, T, H, K] -> [B, H, N, C, K]"""
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % chunk))
    return x.reshape(*x.shape[:2], -1, chunk, x.shape[-1]).exp()


Terms = list[list[tuple[int, int, int, int]]]
FACTORED: dict[str, tuple[Function, list[tuple[int, ...]], Terms, list[int], tuple[int, ...]]] = {
    "permuted": (lambda x: x.permute(2, 0, 1), [(2, 3, 4)], [[(1, 2, 1, 1)], [(2, 3, 1, 1)], [(0, 4, 1, 1)]], [], ()),
    "chunks of a padded axis": (
        chunked,
        [(2, 20, 3, 5)],
        [[(0, 2, 1, 1)], [(2, 3, 1, 8), (3, 8, 1, 1)], [(1, 3, 1, 1)], [(4, 5, 1, 1)]],
        [],
        (),
    ),
    "one padded chunk": (
        chunked,
        [(1, 5, 3, 2)],
        [[], [(3, 8, 1, 1)], [(1, 3, 1, 1)], [(4, 2, 1, 1)]],
        [0, 2],
        (),
    ),
    "packed heads": (
        lambda x: chunked(x.reshape(2, 16, 3, 5)),
        [(32, 15)],
        [[(0, 2, 1, 16), (2, 2, 1, 8), (3, 8, 1, 1)], [(1, 3, 1, 5), (4, 5, 1, 1)]],
        [],
        (),
    ),
    "heads divided over two axes": (
        lambda x: x.flatten(0, 1) * 2,
        [(2, 2, 5)],
        [[(0, 2, 2, 1)], [(0, 2, 1, 1)], [(1, 5, 1, 1)]],
        [],
        (),
    ),
    "three axes in one": (
        lambda x: x.permute(2, 0, 1).reshape(-1),
        [(3, 4, 5)],
        [[(0, 3, 4, 1)], [(0, 4, 1, 1)], [(0, 5, 12, 1)]],
        [],
        (),
    ),
    "repeated heads": (
        lambda x: x[:, :, None].expand(2, 3, 4, 5).reshape(2, 12, 5) + 0,
        [(2, 3, 5)],
        [[(0, 2, 1, 1)], [(1, 3, 4, 1)], [(2, 5, 1, 1)]],
        [],
        (),
    ),
    "tiled heads": (lambda x: x.repeat(1, 4), [(2, 3)], [[(0, 2, 1, 1)], [(1, 3, 1, 1)]], [], ()),
    "broadcast": (lambda x: x[:, None].expand(4, 3, 5) * 2, [(4, 1)], [[(0, 4, 1, 1)], []], [1, 2], ()),
    "a slice of a packed projection": (
        lambda x: x.view(6, 3, 10)[..., 4:].transpose(0, 1) * 2,
        [(6, 30)],
        [[(1, 6, 1, 1)], [(0, 3, 1, 10), (2, 6, 1, 1)]],
        [],
        (0, 4),
    ),
    "flipped": (lambda x: x.flip(1), [(3, 6)], [[(0, 3, 1, 1)], [(1, 6, 1, -1)]], [], (0, 5)),
    "strided": (lambda x: x[1::3], [(12, 2)], [[(0, 4, 1, 3)], [(1, 2, 1, 1)]], [], (1, 0)),
    "padded in front": (lambda x: F.pad(x, (3, 0)), [(2, 6)], [[(0, 2, 1, 1)], [(1, 9, 1, 1)]], [], (0, -3)),
    "diagonal": (lambda x: x.diagonal(), [(4, 4)], [[(0, 4, 1, 1)], [(0, 4, 1, 1)]], [], ()),
    "constant": (lambda x: x[2].expand(3), [(4,)], [[]], [0], (2,)),
    "a long axis": (
        lambda x: x.reshape(-1, 3, 50) * 2,
        [(30000, 50)],
        [[(0, 10000, 1, 3), (1, 3, 1, 1)], [(2, 50, 1, 1)]],
        [],
        (),
    ),
    "long axes merged": (
        lambda x: x.transpose(0, 1).reshape(-1) * 2,
        [(6000, 90)],
        [[(0, 6000, 1, 1)], [(0, 90, 6000, 1)]],
        [],
        (),
    ),
}


@pytest.mark.parametrize("name", FACTORED)
def test_axes(name: str) -> None:
    function, shapes, terms, unused, offsets = FACTORED[name]
    root, leaves, (sizes,) = traced(lambda *inputs: function(*inputs), *shapes)
    found = factor_axes(root, leaves[0], sizes)
    assert axes_of(found) == terms
    assert list(found.unused) == unused
    assert tuple(axis.offset for axis in found.axes) == (offsets or (0,) * len(terms))
    assert (found.root_shape, found.leaf_shape) == (sizes.shape(root), sizes.shape(leaves[0]))
    # the map answers like the access itself
    coords = [torch.randint(n, (500,)) for n in found.root_shape]
    access = trace_access(root, leaves[0], coords, sizes)
    for predicted, actual in zip(found.read(coords), access.coords):
        assert torch.equal(predicted[access.valid], actual[access.valid])


def test_repetition_is_an_atom_without_use() -> None:
    root, (leaf,), (sizes,) = traced(lambda x: x.repeat_interleave(4, 0) * 2, (3, 5))
    found = factor_axes(root, leaf, sizes)
    assert found.atoms == (Atom(0, 3, 4), Atom(0, 4, 1), Atom(1, 5, 1))
    assert [axis.terms for axis in found.axes] == [((0, 1),), ((2, 1),)]


def test_axes_for_every_assignment() -> None:
    root, (leaf,), found = traced(lambda x: chunked(x), (2, 43, 3, 5), symbolic=True)
    assert len(found) == 3
    for sizes in found:
        batch, tokens, heads, width = sizes.shape(leaf)
        chunks = -(-tokens // 8)
        expected = [[(0, batch, 1, 1)], [(2, chunks, 1, 8), (3, 8, 1, 1)], [(1, heads, 1, 1)], [(4, width, 1, 1)]]
        expected[1] = [term for term in expected[1] if term[1] > 1]
        assert axes_of(factor_axes(root, leaf, sizes)) == expected


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.cat([x[4:], x[:4]]), "axis 0 is not read in regular steps"),
        (lambda x: torch.cat([x[:4], x[4:8].flip(0), x[8:]]), "axis 0"),
        (lambda x: torch.stack([x, x.roll(1, 1)]), "not read in regular steps|not a sum"),
        (lambda x: torch.stack([x, x.flip(1)]), "not a sum over the axes"),
        (lambda x: F.pad(x[:1, :1], (0, 5, 0, 5)), "hides all but one position of axis 0"),
        (lambda x: x[:0], "an axis is empty"),
        (lambda x: x[:8].diagonal() + x[0], "two different places"),
    ],
)
def test_axes_that_are_refused(function: Function, message: str) -> None:
    root, (leaf,), (sizes,) = traced(lambda x: function(x), (12, 8), decompose=False)
    with pytest.raises(Unsupported, match=message):
        factor_axes(root, leaf, sizes)


def test_padding_everywhere() -> None:
    root, (leaf,), (sizes,) = traced(lambda x: F.pad(x, (-3, 5, 0, 0)), (4, 3))
    with pytest.raises(Unsupported, match="padding hides it everywhere"):
        factor_axes(root, leaf, sizes)
    assert not everywhere(root, leaf, sizes).valid.any()
