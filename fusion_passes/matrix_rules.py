"""Element rules of operators that read whole rows or matrices: sums, scans, matrix products, triangular solves."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.element_rules import Computation, Rule, operand
from fusion_passes.sizes import Unsupported
from fusion_passes.views import axis_of, broadcast, ravel, unravel

if TYPE_CHECKING:
    from fusion_passes.evaluate import Evaluator

aten = torch.ops.aten

_CHUNK = 2**22  # products held at a time


def _reduced(call: dict[str, Any], rank: int) -> list[int]:
    dims = call.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return sorted(axis_of(d, rank) for d in (dims if isinstance(dims, (list, tuple)) else [dims])) if rank else []


def _rows(call_node: Node, node: Node, index: Tensor, ev: Evaluator) -> Computation:
    """For every element of a reduction the elements that it reduces: [elements, count]."""
    call = semantics.arguments(call_node)
    source = call["self"]
    own = ev.sizes.shape(source)
    axes = _reduced(call, len(own))
    coords = unravel(index, ev.sizes.shape(node))
    if not call.get("keepdim", False):
        for axis in axes:
            coords.insert(axis, torch.zeros_like(index))
    lengths = [own[axis] for axis in axes]
    count = math.prod(lengths)
    ev.admit(node, index.numel() * count)
    inner = unravel(torch.arange(count), lengths)
    offset = sum((c * math.prod(own[a + 1 :]) for c, a in zip(inner, axes)), torch.zeros(count, dtype=torch.int64))
    flat = ravel([torch.zeros_like(c) if a in axes else c for a, c in enumerate(coords)], own).expand(index.shape)
    return (yield source, (flat[:, None] + offset).reshape(-1)).reshape(index.numel(), count)


def _fold(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    rows = yield from _rows(node, node, index, ev)
    return semantics.FOLDS[node.target](rows)


def _variance(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    call, which = node.args if node.target is operator.getitem else (node, 0)
    assert isinstance(call, Node)
    rows = yield from _rows(call, node, index, ev)
    if which == 1:
        return rows.mean(-1)
    correction = semantics.arguments(call)["correction"]
    return rows.var(-1, correction=1 if correction is None else correction)


def _cumsum(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    call, shape = semantics.arguments(node), ev.sizes.shape(node)
    source = call["self"]
    if not shape:
        return (yield source, index)
    axis = axis_of(call["dim"], len(shape))
    coords = unravel(index, shape)
    position, coords[axis] = coords[axis], torch.zeros_like(index)
    first, row = torch.unique(ravel(coords, shape), return_inverse=True)
    last = torch.zeros_like(first).scatter_reduce(0, row, position, "amax")
    length = int(last.max()) + 1
    ev.admit(node, first.numel() * length)
    steps = torch.arange(length)
    needed = steps <= last[:, None]
    flat = first[:, None] + steps * math.prod(shape[axis + 1 :])
    values = yield source, flat[needed]
    table = torch.zeros(needed.shape, dtype=torch.int64 if values.dtype == torch.bool else values.dtype)
    table[needed] = values.to(table.dtype)
    return table.cumsum(1)[row, position]


def _product(a: Node, b: Node, shape: Sequence[int], index: Tensor, ev: Evaluator) -> Computation:
    """Elements of a (batched) matrix product of shape [(N,) rows, columns]."""
    depth, columns = ev.sizes.shape(b)[-2:]
    coords = unravel(index, shape)
    batch = coords[0] if len(coords) == 3 else torch.zeros_like(index)
    row, row_of = torch.unique(batch * shape[-2] + coords[-2], return_inverse=True)
    column, column_of = torch.unique(batch * columns + coords[-1], return_inverse=True)
    ev.admit(a, row.numel() * depth)
    ev.admit(b, column.numel() * depth)
    along = torch.arange(depth)
    left = yield a, (row[:, None] * depth + along).reshape(-1)
    start = column // max(columns, 1) * depth * columns + column % max(columns, 1)
    right = yield b, (start[:, None] + along * columns).reshape(-1)
    left, right = left.reshape(-1, depth), right.reshape(-1, depth)
    size = max(1, _CHUNK // max(depth, 1))
    parts = [(left[i] * right[j]).sum(1) for i, j in zip(row_of.split(size), column_of.split(size))]
    return torch.cat(parts)


def _matmul(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    a, b = node.args[:2]
    assert isinstance(a, Node) and isinstance(b, Node)
    return (yield from _product(a, b, ev.sizes.shape(node), index, ev))


def _matmul_add(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    bias, a, b = node.args[:3]
    assert isinstance(a, Node) and isinstance(b, Node)
    product = yield from _product(a, b, ev.sizes.shape(node), index, ev)
    call = semantics.arguments(node)
    beta, alpha = ev.sizes.of(call["beta"]), ev.sizes.of(call["alpha"])
    if beta == 0:  # the bias is not read, even where it is NaN
        return alpha * product
    return beta * (yield from operand(bias, node, index, ev)) + alpha * product


def _batches(batch: Tensor, outer: Sequence[int], node: Node, ev: Evaluator) -> Tensor:
    """Which matrix of `node` belongs to each matrix of a result with the batch shape `outer`."""
    own = ev.sizes.shape(node)[:-2]
    return ravel(broadcast(unravel(batch, outer), own), own).expand(batch.shape)


def _solve_triangular(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    call, shape = semantics.arguments(node), ev.sizes.shape(node)
    matrix, right, left = call["self"], call["B"], call["left"]
    upper, unit = call["upper"], call["unitriangular"]
    rows, columns = shape[-2:]
    size = rows if left else columns
    coords = unravel(index, shape)
    batch = index // (rows * columns)
    # a line is a column of the result of A X = B, or a row of that of X A = B
    lines = columns if left else rows
    within, across = (coords[-2], coords[-1]) if left else (coords[-1], coords[-2])
    line, line_of = torch.unique(batch * lines + across, return_inverse=True)
    used, used_of = torch.unique(line // lines, return_inverse=True)
    triangle = _triangle(size, upper, unit)
    ev.admit(matrix, used.numel() * triangle.numel())
    ev.admit(right, line.numel() * size)
    a_index = _batches(used, shape[:-2], matrix, ev)[:, None] * size * size + triangle
    entries = yield matrix, a_index.reshape(-1)
    a = torch.zeros(used.numel(), size * size, dtype=torch.float64)
    a[:, triangle] = entries.reshape(used.numel(), -1).double()
    a = a.reshape(-1, size, size)
    stride, step = (1, columns) if left else (columns, 1)
    first = _batches(line // lines, shape[:-2], right, ev) * rows * columns + line % lines * stride
    b = (yield right, (first[:, None] + torch.arange(size) * step).reshape(-1)).reshape(-1, size).double()
    solved = torch.empty_like(b)
    for i in range(used.numel()):
        mine = used_of == i
        system = a[i] if left else a[i].mT
        solved[mine] = torch.linalg.solve_triangular(system, b[mine].mT, upper=upper == left, unitriangular=unit).mT
    return solved[line_of, within]


def _triangle(size: int, upper: bool, unit: bool) -> Tensor:
    """Row-major indices of the entries that a triangular solve reads."""
    ones = torch.ones(size, size, dtype=torch.bool)
    kept = ones.triu(int(unit)) if upper else ones.tril(-int(unit))
    return kept.reshape(-1).nonzero()[:, 0]


def _inverse(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    call = node.args[0]
    assert isinstance(call, Node)
    matrix = call.args[0]
    assert isinstance(matrix, Node)
    size = ev.sizes.shape(matrix)[-1]
    used, used_of = torch.unique(index // (size * size), return_inverse=True)
    ev.admit(matrix, used.numel() * size * size)
    entries = yield matrix, (used[:, None] * size * size + torch.arange(size * size)).reshape(-1)
    try:
        inverse = torch.linalg.inv(entries.reshape(-1, size, size))
    except RuntimeError as error:
        raise Unsupported(f"{node.name} inverts a singular matrix") from error
    return inverse.reshape(-1, size * size)[used_of, index % (size * size)]


RULES: dict[Any, Rule] = {
    **dict.fromkeys(semantics.FOLDS, _fold),
    aten.var.correction: _variance,
    (aten.var_mean.correction, 0): _variance,
    (aten.var_mean.correction, 1): _variance,
    aten.cumsum.default: _cumsum,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.addmm.default: _matmul_add,
    aten.baddbmm.default: _matmul_add,
    aten.linalg_solve_triangular.default: _solve_triangular,
    (aten.linalg_inv_ex.default, 0): _inverse,
}
