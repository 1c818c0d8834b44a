"""How the elements of a node are computed from elements of its inputs, one rule per operator.

A rule is a generator: it yields `(node, row-major indices)` for what it needs, is sent the values, and returns the
values of its own elements. The evaluator answers the requests, so rules neither recurse nor remember anything.
Here are the operators whose elements read a fixed number of elements; `matrix_rules` has sums, products and solves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.sizes import Unsupported
from fusion_passes.views import axis_of, broadcast, ravel, read, slice_start, unravel

if TYPE_CHECKING:
    from fusion_passes.evaluate import Evaluator

aten = torch.ops.aten

_LARGEST = torch.finfo(torch.float32).max

Request = tuple[Node, Tensor]
Computation = Generator[Request, Tensor, Tensor]
Rule = Callable[[Node, Tensor, "Evaluator"], Computation]


def value_dtype(node: Node) -> torch.dtype:
    """The dtype that values of a node are kept in: float64, bool or int64."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise Unsupported(f"{node.name} ({node.target}) is not a tensor")
    if value.dtype.is_complex:
        raise Unsupported(f"{node.name} ({node.target}) is complex")
    if value.dtype.is_floating_point:
        return torch.float64
    return torch.bool if value.dtype == torch.bool else torch.int64


def number(value: float) -> Tensor:
    """A Python number as a zero-dimensional float64, bool or int64 tensor."""
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def operand(argument: Any, node: Node, index: Tensor, ev: Evaluator) -> Generator[Request, Tensor, Any]:
    """The argument of a pointwise node at the elements `index` of the node: broadcast values, or a number."""
    if isinstance(argument, Node):
        if not isinstance(argument.meta.get("val"), torch.Tensor):
            return number(ev.sizes.of(argument))
        shape, own = ev.sizes.shape(node), ev.sizes.shape(argument)
        if own == shape:
            return (yield argument, index)
        flat = ravel(broadcast(unravel(index, shape), own), own)
        return (yield argument, flat.expand(index.shape))
    return number(argument) if isinstance(argument, (bool, int, float)) else argument


def convert(node: Node, values: Tensor, source: torch.dtype, ev: Evaluator) -> Tensor:
    """`values` of dtype `source` converted to the dtype of `node`."""
    target = node.meta["val"].dtype
    if not target.is_floating_point:
        if target == torch.bool or values.dtype == torch.bool:
            return values.to(value_dtype(node))
        return values.to(torch.int64).to(target).to(torch.int64)  # towards zero, then wrapping
    if target.itemsize == 1:
        if not ev.round_float8:
            return values.double()
        limits = torch.finfo(target)
        return values.float().clamp(limits.min, limits.max).to(target).double()
    if source.is_floating_point and source != target and target.itemsize <= source.itemsize:
        ev.note_rounding(node)
    return values.double()


def filled(chosen: Tensor, index: Tensor, node: Node, pieces: Sequence[Callable[[Tensor], Computation]]) -> Computation:
    """Values of two computations put together: the first where `chosen`, the second elsewhere, neither in vain."""
    out = torch.empty(index.shape, dtype=value_dtype(node))
    for where, piece in zip((chosen, ~chosen), pieces, strict=True):
        if where.any():
            out[where] = (yield from piece(where)).to(out.dtype)
    return out


def _pointwise(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    values = yield from apply(semantics.POINTWISE[node.target], node, node, index, ev)
    dtype = node.meta["val"].dtype
    if not dtype.is_floating_point:
        return wrapped(values, dtype)
    if dtype.itemsize > 4:
        return values
    if dtype.itemsize < 4:
        ev.note_rounding(node)
    return float32_range(values)


def wrapped(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers as a narrower integer type holds them; others as they are."""
    if dtype == torch.bool or values.dtype != torch.int64:
        return values
    return values.to(dtype).to(torch.int64)


def float32_range(values: Tensor) -> Tensor:
    """Float64 values with the overflow of float32, and its underflow likewise (below the smallest reciprocal).

    float16 has the same range here, since Inductor computes it in float32.
    """
    magnitude = values.abs()
    values = torch.where(magnitude > _LARGEST, values.sign() * math.inf, values)
    return torch.where(magnitude < 1.0 / _LARGEST, 0.0, values)


def apply(function: Callable[..., Tensor], call: Node, node: Node, index: Tensor, ev: Evaluator) -> Computation:
    """A function of the arguments of `call`, at the elements of `node` (the call, or an element of its tuple)."""
    args, kwargs = [], {}
    for argument in call.args:
        args.append((yield from operand(argument, node, index, ev)))
    for name, argument in call.kwargs.items():
        kwargs[name] = yield from operand(argument, node, index, ev)
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Unsupported(f"{node.name} ({call.target}) cannot be evaluated: {error}") from error


def _log_sigmoid(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    call = node.args[0]
    assert isinstance(call, Node)
    return (yield from apply(semantics.TUPLES[call.target][0], call, node, index, ev))


def _selection(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    mask, yes, no = (node.args[i] for i in semantics.SELECTIONS[node.target])
    chosen = (yield from operand(mask, node, index, ev)).bool().expand(index.shape)

    def branch(argument: Any) -> Callable[[Tensor], Computation]:
        return lambda at: operand(argument, node, index[at], ev)

    return (yield from filled(chosen, index, node, [branch(yes), branch(no)]))


def view(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    """Views, splits, pads and copies."""
    source = node.args[0]
    if node.target in semantics.RESHAPES | semantics.COPIES and isinstance(source, Node):
        return (yield source, index)
    shown = read(node, unravel(index, ev.sizes.shape(node)), ev.sizes)
    flat = ravel(shown.coords, ev.sizes.shape(shown.source)).expand(index.shape)
    if shown.valid is None:
        return (yield shown.source, flat)
    valid = shown.valid.expand(index.shape)
    out = torch.full(index.shape, shown.fill or 0, dtype=value_dtype(node))
    if valid.any():
        out[valid] = yield shown.source, flat[valid]
    return out


def _cast(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    source = node.args[0]
    assert isinstance(source, Node)
    values = yield source, index
    return convert(node, values, source.meta["val"].dtype, ev)


def _copy(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    values = yield from operand(node.args[1], node, index, ev)
    source = node.args[1]
    dtype = source.meta["val"].dtype if isinstance(source, Node) else values.dtype
    return convert(node, values, dtype, ev)


def _fill(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    yield from ()  # asks for nothing
    if node.target in semantics.EMPTIES:
        value: float = float("nan") if value_dtype(node).is_floating_point else 0
    elif node.target in semantics.FILL_VALUE:
        value = semantics.FILL_VALUE[node.target]
    else:
        position = semantics.FILL_ARGUMENT[node.target]
        given = list(semantics.arguments(node).values())[position]
        value = ev.sizes.of(given)
    return torch.full(index.shape, value, dtype=value_dtype(node))


def _ramp(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    yield from ()  # asks for nothing
    call = semantics.arguments(node)
    values = ev.sizes.of(call.get("start", 0)) + ev.sizes.of(call.get("step", 1)) * index
    return wrapped(values, node.meta["val"].dtype)


def _slice_scatter(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    call, shape, coords = semantics.arguments(node), ev.sizes.shape(node), unravel(index, ev.sizes.shape(node))
    axis, source = axis_of(call["dim"], len(shape)), call["src"]
    own = ev.sizes.shape(source)
    step = ev.sizes.of(call["step"])
    moved = coords[axis] - slice_start(call["start"], shape[axis], ev.sizes)
    inside = (moved >= 0) & (moved % step == 0) & (moved // step < own[axis])
    coords[axis] = moved // step
    return (yield from _overwritten(node, index, inside, source, ravel(coords, own)))


def _select_scatter(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    call, shape, coords = semantics.arguments(node), ev.sizes.shape(node), unravel(index, ev.sizes.shape(node))
    axis, source = axis_of(call["dim"], len(shape)), call["src"]
    inside = coords.pop(axis) == axis_of(ev.sizes.of(call["index"]), shape[axis])
    return (yield from _overwritten(node, index, inside, source, ravel(coords, ev.sizes.shape(source))))


def _overwritten(node: Node, index: Tensor, inside: Tensor, source: Node, flat: Tensor) -> Computation:
    base = node.args[0]
    assert isinstance(base, Node)
    flat = flat.expand(index.shape)
    return (yield from filled(inside, index, node, [_ask(source, flat), _ask(base, index)]))


def _ask(node: Node, flat: Tensor) -> Callable[[Tensor], Computation]:
    def ask(at: Tensor) -> Computation:
        return (yield node, flat[at])

    return ask


def _cat(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    call, shape = semantics.arguments(node), ev.sizes.shape(node)
    coords, axis = unravel(index, shape), axis_of(call["dim"], len(shape))
    out = torch.empty(index.shape, dtype=value_dtype(node))
    begin = 0
    for piece in call["tensors"]:
        own = ev.sizes.shape(piece)
        if own == (0,):  # a piece without elements may have any shape
            continue
        inside = (coords[axis] >= begin) & (coords[axis] < begin + own[axis])
        if inside.any():
            moved = [c[inside] - begin if a == axis else c[inside] for a, c in enumerate(coords)]
            out[inside] = (yield piece, ravel(moved, own)).to(out.dtype)
        begin += own[axis]
    return out


def _stack(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    call, shape = semantics.arguments(node), ev.sizes.shape(node)
    coords = unravel(index, shape)
    which = coords.pop(axis_of(call["dim"], len(shape)))
    flat = ravel(coords, ev.sizes.shape(call["tensors"][0])).expand(index.shape)
    out = torch.empty(index.shape, dtype=value_dtype(node))
    for i, piece in enumerate(call["tensors"]):
        if (which == i).any():
            out[which == i] = (yield piece, flat[which == i]).to(out.dtype)
    return out


def _index(node: Node, index: Tensor, ev: Evaluator) -> Computation:
    call = semantics.arguments(node)
    source, tables = call["self"], list(call["indices"])
    own, coords = ev.sizes.shape(source), unravel(index, ev.sizes.shape(node))
    tables += [None] * (len(own) - len(tables))
    indexed = [axis for axis, table in enumerate(tables) if table is not None]
    if any(value_dtype(tables[axis]) == torch.bool for axis in indexed):
        raise Unsupported(f"{node.name} ({node.target}) selects by a mask")
    shapes = [ev.sizes.shape(tables[axis]) for axis in indexed]
    rank = max(map(len, shapes))
    adjacent = indexed == list(range(indexed[0], indexed[0] + len(indexed)))
    first = indexed[0] if adjacent else 0  # where the axes of the tables stand in the result
    lookup, rest = coords[first : first + rank], iter(coords[:first] + coords[first + rank :])
    moved: list[Tensor] = []
    for axis, table in enumerate(tables):
        if table is None:
            moved.append(next(rest))
            continue
        shape = ev.sizes.shape(table)
        position = yield table, ravel(broadcast(lookup, shape), shape).expand(index.shape)
        moved.append(torch.where(position < 0, position + own[axis], position))
        if bool((moved[-1] < 0).any() or (moved[-1] >= own[axis]).any()):
            raise Unsupported(f"{node.name} ({node.target}) reads outside of {source.name}")
    return (yield source, ravel(moved, own).expand(index.shape))


RULES: dict[Any, Rule] = {
    **dict.fromkeys(semantics.POINTWISE, _pointwise),
    **dict.fromkeys(semantics.SELECTIONS, _selection),
    **dict.fromkeys(semantics.VIEWS - semantics.SPLITS, view),
    **dict.fromkeys(semantics.COPIES, view),
    **dict.fromkeys(semantics.CASTS, _cast),
    **dict.fromkeys(semantics.FILLS, _fill),
    **dict.fromkeys(semantics.RAMPS, _ramp),
    aten.copy.default: _copy,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.index.Tensor: _index,
    aten._unsafe_index.Tensor: _index,
    # an element of a tuple: (target of the call, position)
    (aten.log_sigmoid_forward.default, 0): _log_sigmoid,
}
