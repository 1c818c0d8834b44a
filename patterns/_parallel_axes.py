"""Which axes does every node of a subgraph treat in parallel: batch, heads, chunks of a sequence?

Every axis of a tensor is described as a product of factors, outermost first. A factor is one of the named axes that
the leaves start with, anonymous, or `ANY`: the values do not vary along it. A node is followed only where each element
of the result reads elements of the same batch, head and chunk alone, and all of them in the same way. What is
evaluated for one batch, head and chunk therefore holds for all.

Time is one named axis until it is divided into chunks. Reading one chunk (a select, or a slice of the sequence) ends
the parallel part; the `level` of a node is the last chunk that it depends on.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.fusion import NearMiss
from fusion_passes.patterns._axis_factors import (
    ANY,
    CHUNKS,
    PLAIN,
    SPELLED,
    TIME,
    Dim,
    Factor,
    Layout,
    broadcast,
    flat,
    normal,
    plain,
    unify,
)
from fusion_passes.sizes import Sizes
from fusion_passes.views import axis_of, slice_start

aten, prims = torch.ops.aten, torch.ops.prims


class Read(NamedTuple):
    """A node that reads one chunk of `source`."""

    source: Node
    chunk: int


class ParallelAxes:
    """Layouts and levels of the nodes of a subgraph, given to `visit` in topological order.

    Args:
        leaves: the layout of each leaf.
        chunks: number of chunks that time is divided into.
        chunk: tokens per chunk; the last chunk may be shorter.
        sizes: integers for symbolic sizes.
    """

    def __init__(self, leaves: Mapping[Node, Layout], chunks: int, chunk: int, sizes: Sizes) -> None:
        self.layouts: dict[Node, Layout] = {node: tuple(map(normal, layout)) for node, layout in leaves.items()}
        self.levels: dict[Node, int] = dict.fromkeys(leaves, -1)
        self.reads: dict[Node, Read] = {}
        self.chunks, self.chunk, self.sizes = chunks, chunk, sizes

    def visit(self, node: Node) -> None:
        """Find the layout and the level of a node whose inputs have been visited.

        Raises:
            NearMiss: it mixes batches, heads or chunks, or is not known.
        """
        if node in self.levels or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            return
        self.levels[node] = max((self.levels.get(n, -1) for n in node.all_input_nodes), default=-1)
        if not isinstance(node.meta["val"], torch.Tensor):
            return  # a split: its elements are looked at one by one
        rule = _getitem if node.target is operator.getitem else _RULES.get(node.target)
        if rule is None:
            raise NearMiss(f"{node.name} ({node.target}) may mix batches, heads or chunks")
        layout = tuple(map(normal, rule(node, self)))
        names = [f.name for dim in layout for f in dim if f.name not in (ANY, PLAIN)]
        if len(set(names)) < len(names):
            raise NearMiss(f"{node.name} combines every {SPELLED[names[-1]]} with every other")
        if self.levels[node] >= 0 and (TIME in names or CHUNKS in names):
            raise NearMiss(f"{node.name} combines a single chunk with all of them")
        self.layouts[node] = layout

    def of(self, argument: Any) -> Layout:
        """The layout of an argument; numbers have no axes."""
        return self.layouts[argument] if isinstance(argument, Node) and argument in self.layouts else ()

    def time_like(self, dim: Dim) -> bool:
        """Is this all of time, padded or not, so that a slice of it may be a chunk?"""
        whole = (Factor(CHUNKS, self.chunks), Factor(PLAIN, self.chunk))
        return self.chunks > 1 and (dim == whole or (len(dim) == 1 and dim[0].name == TIME))

    def read(self, node: Node, source: Node, index: int) -> None:
        """Note that `node` reads one chunk."""
        self.reads[node] = Read(source, index)
        self.levels[node] = max(self.levels[node], index)


# --- one rule per kind of operator -----------------------------------------------------------------------------------

Rule = Callable[[Node, ParallelAxes], Sequence[Sequence[Factor]]]


def _elementwise(node: Node, axes: ParallelAxes) -> Layout:
    found = broadcast([axes.of(argument) for argument in node.args], node)
    return ((),) * (len(axes.sizes.shape(node)) - len(found)) + found


def _same(node: Node, axes: ParallelAxes) -> Layout:
    return axes.of(node.args[0])


def _constant(name: str) -> Rule:
    return lambda node, axes: tuple((Factor(name, n),) for n in axes.sizes.shape(node))


def _overwrite(node: Node, axes: ParallelAxes) -> Layout:
    # copy(base, source): nothing of the base is left
    return broadcast([tuple((Factor(ANY, n),) for n in axes.sizes.shape(node)), axes.of(node.args[1])], node)


def _reshape(node: Node, axes: ParallelAxes) -> list[list[Factor]]:
    pending = list(flat(axes.of(node.args[0])))
    dims: list[list[Factor]] = []
    for size in axes.sizes.shape(node):
        dim: list[Factor] = []
        while math.prod(f.size for f in dim) < size:
            factor = pending.pop(0)
            missing = size // math.prod(f.size for f in dim)
            if factor.size > missing:
                outer, inner = _divide(factor, missing, node, axes)
                pending.insert(0, inner)
                factor = outer
            dim.append(factor)
        if math.prod(f.size for f in dim) != size:
            raise NearMiss(f"{node.name} divides an axis unevenly")
        dims.append(dim)
    return dims


def _divide(factor: Factor, outer: int, node: Node, axes: ParallelAxes) -> tuple[Factor, Factor]:
    if factor.size % outer:
        raise NearMiss(f"{node.name} divides an axis unevenly")
    inner = factor.size // outer
    if factor.name in (ANY, PLAIN):
        return Factor(factor.name, outer), Factor(factor.name, inner)
    if factor.name == TIME and (outer, inner) == (axes.chunks, axes.chunk):
        return Factor(CHUNKS, outer), Factor(PLAIN, inner)
    if factor.name == TIME:
        raise NearMiss(f"{node.name} divides the sequence into chunks of {inner}, the results into {axes.chunk}")
    raise NearMiss(f"{node.name} divides the axis of the {SPELLED[factor.name]}")


def _permute(node: Node, axes: ParallelAxes) -> Layout:
    source, call = axes.of(node.args[0]), semantics.arguments(node)
    rank = len(source)
    if node.target is aten.t.default:
        order = list(range(rank))[::-1]
    elif node.target is aten.transpose.int:
        order = list(range(rank))
        i, j = axis_of(call["dim0"], rank), axis_of(call["dim1"], rank)
        order[i], order[j] = order[j], order[i]
    else:
        order = [axis_of(d, rank) for d in call.get("dims", call.get("permutation", ()))]
    return tuple(source[i] for i in order)


def _expand(node: Node, axes: ParallelAxes) -> list[Dim]:
    source, (own,) = axes.of(node.args[0]), [axes.sizes.shape(n) for n in node.args[:1] if isinstance(n, Node)]
    shape = axes.sizes.shape(node)
    new = len(shape) - len(own)
    return [
        source[i - new] if i >= new and own[i - new] == size else (Factor(ANY, size),) for i, size in enumerate(shape)
    ]


def _part(node: Node, source: Node, axis: int, first: int, length: int, step: int, axes: ParallelAxes) -> list[Dim]:
    """Some positions of an axis."""
    dims = list(axes.of(source))
    dim, size = dims[axis], axes.sizes.shape(source)[axis]
    if length == size:
        return dims
    if plain(dim):
        dims[axis] = (Factor(ANY if all(f.name == ANY for f in dim) else PLAIN, length),)
    elif dim == (Factor(CHUNKS, axes.chunks),) and length == 1:
        axes.read(node, source, first)
        dims[axis] = ()
    elif axes.time_like(dim) and first % axes.chunk == 0 and step == 1 and _is_chunk(first, length, size, axes):
        axes.read(node, source, first // axes.chunk)
        dims[axis] = (Factor(PLAIN, length),)
    else:
        spelled = next(SPELLED[f.name] for f in dim if f.name in SPELLED)
        raise NearMiss(f"{node.name} takes positions {first} to {first + length - 1} of the axis of the {spelled}")
    return dims


def _is_chunk(first: int, length: int, size: int, axes: ParallelAxes) -> bool:
    return length == axes.chunk or (first + length == size and length < axes.chunk)


def _slice(node: Node, axes: ParallelAxes) -> list[Dim]:
    call = semantics.arguments(node)
    source = call["self"]
    shape = axes.sizes.shape(source)
    axis = axis_of(call["dim"], len(shape))
    first = slice_start(call["start"], shape[axis], axes.sizes)
    return _part(node, source, axis, first, axes.sizes.shape(node)[axis], axes.sizes.of(call["step"]), axes)


def _select(node: Node, axes: ParallelAxes) -> list[Dim]:
    call = semantics.arguments(node)
    source = call["self"]
    shape = axes.sizes.shape(source)
    axis = axis_of(call["dim"], len(shape))
    dims = _part(node, source, axis, axis_of(axes.sizes.of(call["index"]), shape[axis]), 1, 1, axes)
    return dims[:axis] + dims[axis + 1 :]


def _getitem(node: Node, axes: ParallelAxes) -> Sequence[Sequence[Factor]]:
    call, which = node.args
    assert isinstance(call, Node) and isinstance(which, int)
    if call.target is aten.linalg_inv_ex.default and which == 0:
        return _matrix_function(call, axes)
    if call.target not in semantics.SPLITS:
        raise NearMiss(f"{node.name} ({call.target}) may mix batches, heads or chunks")
    source = call.args[0]
    assert isinstance(source, Node)
    shape = axes.sizes.shape(source)
    axis = axis_of(semantics.arguments(call)["dim"], len(shape))
    if call.target is aten.unbind.int:
        dims = _part(node, source, axis, axis_of(which, shape[axis]), 1, 1, axes)
        return dims[:axis] + dims[axis + 1 :]
    values = call.meta["val"]
    first = sum(axes.sizes.of(v.shape[axis]) for v in values[: which % len(values)])
    return _part(node, source, axis, first, axes.sizes.shape(node)[axis], 1, axes)


def _pad(node: Node, axes: ParallelAxes) -> list[Dim]:
    call, dims = semantics.arguments(node), list(axes.of(node.args[0]))
    shape = axes.sizes.shape(node)
    for i, (before, after) in enumerate(zip(call["pad"][::2], call["pad"][1::2])):
        axis = len(dims) - 1 - i
        before, after = axes.sizes.of(before), axes.sizes.of(after)
        if not before and not after:
            continue
        if plain(dims[axis]):
            dims[axis] = (Factor(PLAIN, shape[axis]),)
        elif len(dims[axis]) == 1 and dims[axis][0].name == TIME and not before and after > 0:
            dims[axis] = (Factor(TIME, shape[axis]),)
        else:
            spelled = next(SPELLED[f.name] for f in dims[axis] if f.name in SPELLED)
            raise NearMiss(f"{node.name} pads or cuts the axis of the {spelled}")
    return dims


def _join(node: Node, axes: ParallelAxes) -> list[Dim]:
    call, shape = semantics.arguments(node), axes.sizes.shape(node)
    axis = axis_of(call["dim"], len(shape))
    parts = [part for part in call["tensors"] if axes.sizes.shape(part) != (0,)]
    layouts = [list(axes.of(part)) for part in parts]
    if node.target is aten.stack.default:
        layouts = [[*layout[:axis], (), *layout[axis:]] for layout in layouts]
    along = [layout[axis] for layout in layouts]
    padded = bool(along[0]) and along[0][0].name == TIME and all(f.name == ANY for dim in along[1:] for f in dim)
    if not padded and not all(map(plain, along)):
        raise NearMiss(f"{node.name} puts parts of batches, heads or chunks together")
    for layout in layouts:
        layout[axis] = ()
    dims = list(broadcast([tuple(layout) for layout in layouts], node))
    dims[axis] = (Factor(TIME if padded else PLAIN, shape[axis]),)
    return dims


def _scatter(node: Node, axes: ParallelAxes) -> list[Dim]:
    call, base = semantics.arguments(node), list(axes.of(node.args[0]))
    source = list(axes.of(call["src"]))
    axis = axis_of(call["dim"], len(base))
    if node.target is aten.select_scatter.default:
        source.insert(axis, ())
    elif axes.sizes.shape(call["src"])[axis] == axes.sizes.shape(node)[axis]:
        return list(_overwrite(node, axes))
    if not plain(base[axis]) or not plain(source[axis]):
        raise NearMiss(f"{node.name} writes to some batches, heads or chunks only")
    base[axis] = source[axis] = ()
    dims = list(broadcast([tuple(base), tuple(source)], node))
    dims[axis] = (Factor(PLAIN, axes.sizes.shape(node)[axis]),)
    return dims


def _contracted(dims: Sequence[Dim], node: Node) -> None:
    for dim in dims:
        if not plain(dim):
            spelled = next(SPELLED[f.name] for f in dim if f.name in SPELLED)
            raise NearMiss(f"{node.name} adds up over the axis of the {spelled}")


def _fold(node: Node, axes: ParallelAxes) -> list[Dim]:
    call, dims = semantics.arguments(node), list(axes.of(node.args[0]))
    dim = call.get("dim")
    if dim is None or dim == []:
        reduced = set(range(len(dims)))
    else:
        reduced = {axis_of(d, len(dims)) for d in (dim if isinstance(dim, (list, tuple)) else [dim])}
    _contracted([dims[axis] for axis in reduced], node)
    kept = call.get("keepdim", False)
    return [() if axis in reduced else d for axis, d in enumerate(dims) if kept or axis not in reduced]


def _scan(node: Node, axes: ParallelAxes) -> list[Dim]:
    dims = list(axes.of(node.args[0]))
    if dims:
        axis = axis_of(semantics.arguments(node)["dim"], len(dims))
        _contracted([dims[axis]], node)
        dims[axis] = tuple(Factor(PLAIN, f.size) for f in dims[axis])
    return dims


def _product(node: Node, axes: ParallelAxes) -> list[Dim]:
    bias = node.target in (aten.addmm.default, aten.baddbmm.default)
    a, b = (axes.of(n) for n in node.args[int(bias) : int(bias) + 2])
    _contracted([a[-1], b[-2]], node)
    dims = [*(unify(x, y, node) for x, y in zip(a[:-2], b[:-2])), a[-2], b[-1]]
    return list(broadcast([axes.of(node.args[0]), tuple(dims)], node)) if bias else dims


def _solve(node: Node, axes: ParallelAxes) -> list[Dim]:
    call = semantics.arguments(node)
    a, b = axes.of(call["self"]), axes.of(call["B"])
    solved, other = (-2, -1) if call["left"] else (-1, -2)
    _contracted([a[-1], a[-2], b[solved]], node)
    dims = [*broadcast([a[:-2], b[:-2]], node), (), ()]
    dims[solved] = (Factor(PLAIN, axes.sizes.shape(node)[solved]),)
    dims[other] = b[other]
    return dims


def _matrix_function(node: Node, axes: ParallelAxes) -> list[Dim]:
    dims = list(axes.of(node.args[0]))
    _contracted(dims[-2:], node)
    return [*dims[:-2], *(tuple(Factor(PLAIN, f.size) for f in dim) for dim in dims[-2:])]


def _flip(node: Node, axes: ParallelAxes) -> list[Dim]:
    dims = list(axes.of(node.args[0]))
    _contracted([dims[axis_of(d, len(dims))] for d in semantics.arguments(node)["dims"]], node)
    return dims


def _diagonal(node: Node, axes: ParallelAxes) -> list[Dim]:
    call, dims = semantics.arguments(node), list(axes.of(node.args[0]))
    gone = {axis_of(call[name], len(dims)) for name in ("dim1", "dim2")}
    _contracted([dims[axis] for axis in gone], node)
    return [d for axis, d in enumerate(dims) if axis not in gone] + [(Factor(PLAIN, axes.sizes.shape(node)[-1]),)]


_RULES: dict[Any, Rule] = {
    **dict.fromkeys(semantics.POINTWISE, _elementwise),
    **dict.fromkeys(semantics.SELECTIONS, _elementwise),
    **dict.fromkeys(semantics.CASTS | semantics.COPIES, _same),
    **dict.fromkeys(semantics.FILLS, _constant(ANY)),
    **dict.fromkeys(semantics.RAMPS, _constant(PLAIN)),
    **dict.fromkeys(semantics.RESHAPES, _reshape),
    **dict.fromkeys(semantics.FOLDS, _fold),
    **dict.fromkeys(semantics.SCANS, _scan),
    **dict.fromkeys(semantics.PRODUCTS, _product),
    aten.copy.default: _overwrite,
    **dict.fromkeys((aten.permute.default, prims.transpose.default, aten.transpose.int, aten.t.default), _permute),
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.constant_pad_nd.default: _pad,
    aten.cat.default: _join,
    aten.stack.default: _join,
    aten.select_scatter.default: _scatter,
    aten.slice_scatter.default: _scatter,
    aten.linalg_solve_triangular.default: _solve,
    aten.tril.default: _matrix_function,
    aten.triu.default: _matrix_function,
    aten.flip.default: _flip,
    prims.rev.default: _flip,
    aten.diagonal.default: _diagonal,
}

_FOLLOWED: frozenset[Any] = frozenset(_RULES) | semantics.SPLITS | {aten.linalg_inv_ex.default}


def followed(node: Node) -> bool:
    """Is there a rule for this kind of node?"""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and node.args[0].target in _FOLLOWED
    return node.target in _FOLLOWED
