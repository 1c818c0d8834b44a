"""Which functions of its data a delta rule may hold, beside sums and products.

Two analytic functions that agree on random values agree everywhere in theory. In float64 a step far away looks like a
constant: `x * sigmoid(1e4 * (x + 9))`, or `sqrt((x + 9)^2) - 9`, is x as far as moderate values show, and so is
`sqrt(x^2)` where only positive ones are drawn. So a function that bends has the one place that a delta rule has for it:
exponentials are those of decays, roots those of sums of squares of the rows of q or k.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.fusion import NearMiss

aten, prims = torch.ops.aten, torch.ops.prims

_EXPONENTIALS = {
    aten.exp.default, aten.exp2.default, aten.expm1.default, prims.exp.default, prims.exp2.default,
    prims.expm1.default, aten.pow.Scalar,
}  # fmt: skip
_ROOTS = {aten.sqrt.default, aten.rsqrt.default, prims.sqrt.default, prims.rsqrt.default}
_POWERS = {aten.pow.Tensor_Scalar, prims.pow.default}
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, prims.mul.default}
_QUOTIENTS = {aten.div.Tensor, aten.div.Scalar, prims.div.default}
_SHIFTS = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, prims.add.default, prims.sub.default,
}  # fmt: skip
_FOLDS = {aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim}
_MOVES = semantics.VIEWS | semantics.COPIES | semantics.CASTS


def check_bends(nodes: Sequence[Node], depends: Mapping[Node, int], decay: int, rows: Collection[int]) -> None:
    """Exponentials are those of decays, roots those of sums of squares of rows, and quotients are by one of these.

    Args:
        nodes: inputs before users.
        depends: the leaves that a node depends on, as bits.
        decay: the bit of the gate, or of its sums.
        rows: the bits of q and k.

    Raises:
        NearMiss: one is of something else.
    """
    for node in nodes:
        if not depends[node]:
            continue
        if node.target in _EXPONENTIALS:
            fits = depends[node] == decay
        elif node.target in _ROOTS or (node.target in _POWERS and node.args[1] in (0.5, -0.5)):
            fits = depends[node] in rows and _is_sum_of_squares(node.args[0], depends)
        elif node.target in _POWERS:
            fits = node.args[1] in (1, 2)
        elif node.target in _QUOTIENTS:
            divisor = node.args[1]
            fits = not isinstance(divisor, Node) or depends.get(divisor, 0) in (0, decay, *rows)
        elif node.target in (aten.reciprocal.default, prims.reciprocal.default):
            fits = depends[node] in (decay, *rows)
        else:
            fits = node.target not in (aten.sigmoid.default, aten.addcdiv.default)
        if not fits:
            raise NearMiss(f"{node.name} ({node.target}) is of something else than in a delta rule")


def _is_sum_of_squares(node: object, depends: Mapping[Node, int]) -> bool:
    """Is it a sum or mean of squares of one leaf's values, times and plus constants?"""
    while isinstance(node, Node) and node.target not in _FOLDS:
        node = _scaled(node, depends, _SHIFTS)
    square = node.args[0] if isinstance(node, Node) else None
    while isinstance(square, Node) and not _is_square(square, depends):
        square = _scaled(square, depends)
    return isinstance(square, Node)


def _is_square(node: Node, depends: Mapping[Node, int]) -> bool:
    if node.target in _PRODUCTS:
        return all(isinstance(factor, Node) and _is_multiple(factor, depends) for factor in node.args)
    if node.target is not aten.square.default and (node.target not in _POWERS or node.args[1] != 2):
        return False
    return isinstance(node.args[0], Node) and _is_multiple(node.args[0], depends)


def _is_multiple(node: Node, depends: Mapping[Node, int]) -> bool:
    """Are these values of a leaf, moved and times constants?"""
    at: Node | None = node
    while at is not None and any(depends.get(source) for source in at.all_input_nodes):
        at = _scaled(at, depends)
    return at is not None and bool(depends.get(at))


def _scaled(node: Node, depends: Mapping[Node, int], more: Collection[object] = ()) -> Node | None:
    """What `node` is a moved or constant multiple of, or with `more` a result of these with a constant."""
    data = [source for source in node.all_input_nodes if depends.get(source)]
    if len(data) != 1 or node.args.count(data[0]) != 1:
        return None
    divided = node.target in _QUOTIENTS and node.args[0] is data[0]
    return data[0] if divided or node.target in _MOVES | _PRODUCTS or node.target in more else None
