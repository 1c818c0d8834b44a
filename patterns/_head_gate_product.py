"""The matrix product of a head gate: which operand are the rows, which the weights, and what they are made of.

A product is taken as it is spelled, `mm` or `bmm`, in either order. Its operands are followed back through views,
copies, upcasts and constant factors to the tensors that the fused op reads (`Side`); the views between are done again
on those tensors.
"""

from __future__ import annotations

import dataclasses
import math
import operator

import torch
from torch.fx import Graph, Node

from fusion_passes import aten as semantics
from fusion_passes import rewrite

aten = torch.ops.aten

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FEWEST_HEADS, MOST_HEADS = 8, 128

# Views that keep every element once, or only repeat it.
_MOVES = semantics.RESHAPES | {aten.permute.default, aten.transpose.int, aten.t.default}
_VIEWS = _MOVES | {aten.expand.default}
_FACTORS = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})


@dataclasses.dataclass(frozen=True)
class Side:
    """An operand of the product.

    Attributes:
        leaf: the tensor it is made of.
        steps: the nodes from the leaf to the operand, in order: views, copies, upcasts and constant factors.
        factor: the product of the constant factors.
    """

    leaf: Node
    steps: tuple[Node, ...]
    factor: float

    @property
    def operand(self) -> Node:
        return self.steps[-1] if self.steps else self.leaf

    @property
    def upcast(self) -> bool:
        return any(step.target in semantics.CASTS for step in self.steps)

    def again(self, graph: Graph) -> Node:
        """The views between leaf and operand, on the leaf itself."""
        return viewed_again(graph, self.leaf, self.steps)


@dataclasses.dataclass(frozen=True)
class Product:
    """out[.., r, h] = sum over k of rows[.., r, k] * weights[k, h], or its transpose.

    Attributes:
        node: the `mm` or `bmm`.
        rows, weights: its operands.
        transposed: the weights are the left operand, and the product is [.., h, r], in memory too.
        heads, columns: the numbers of h and k.
    """

    node: Node
    rows: Side
    weights: Side
    transposed: bool
    heads: int
    columns: int

    @property
    def batched(self) -> bool:
        return self.node.target is aten.bmm.default

    def operands_for_op(self, graph: Graph) -> tuple[Node, Node]:
        """x [B, T, K] and weight [H, K] as views of the leaves."""
        x, weight = self.rows.again(graph), self.weights.again(graph)
        if self.batched:
            weight = rewrite.call(graph, aten.select.int, weight, 0, 0)
        if self.transposed:
            x = rewrite.call(graph, aten.permute.default, x, [0, 2, 1] if self.batched else [1, 0])
        else:
            weight = rewrite.call(graph, aten.permute.default, weight, [1, 0])
        return (x if self.batched else rewrite.call(graph, aten.unsqueeze.default, x, 0)), weight

    def as_in_graph(self, graph: Graph, out: Node) -> Node:
        """The op's result, [B, T, H] or where transposed [B, H, T], in the axes of the product."""
        return out if self.batched else rewrite.call(graph, aten.squeeze.dim, out, 0)


def may_be_gate(node: Node) -> bool:
    """Has the product of `node` a number of heads along one of its last two axes? Cheap."""
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and value.dtype in FLOATS
        and any(_is_head_count(n) for n in value.shape[-2:])
        and isinstance(node.args[0], Node)
        and isinstance(node.args[0].meta["val"].shape[-1], int)
    )


def product_of(node: Node) -> Product | None:
    """The operands of a product by their roles; None where no operand can be the weights of heads.

    Those of attention cannot, for example: they are others for every batch.
    """
    left, right = node.args[:2]
    assert isinstance(left, Node) and isinstance(right, Node)
    rows, heads = node.meta["val"].shape[-2:]
    choices: list[bool] = []
    if node.target is aten.bmm.default:
        counts = {False: (heads, right), True: (rows, left)}
        choices = [t for t, (count, side) in counts.items() if _is_head_count(count) and _repeats(side)]
    if len(choices) != 1 and (node.target is aten.mm.default or _single(left)):
        choices = _roles_by_origin(left, right, rows, heads)
    if not choices:
        return None
    transposed = choices[0]
    sides = side_of(right if transposed else left), side_of(left if transposed else right)
    columns = left.meta["val"].shape[-1]
    return Product(node, *sides, transposed, int(rows if transposed else heads), int(columns))


def _roles_by_origin(left: Node, right: Node, rows: object, heads: object) -> list[bool]:
    """Whether the weights may be the left operand (True), the right one (False), or neither.

    A few tokens look like heads, and the outputs of a large linear layer like tokens. Where both sizes are known,
    parameters are weights, and in doubt the right operand is.
    """
    left_is_parameter, right_is_parameter = _is_parameter(left), _is_parameter(right)
    found = []
    if _is_head_count(heads) and (right_is_parameter or not left_is_parameter):
        found.append(False)
    if _is_head_count(rows) and (not isinstance(heads, int) or (left_is_parameter and not right_is_parameter)):
        found.append(True)
    return found


def side_of(operand: Node) -> Side:
    """Where an operand comes from, as far as the kernel can follow: a leaf below all upcasts, copies and factors."""
    node, steps, factor = operand, [], 1.0
    leaf, taken, taken_factor = operand, 0, 1.0
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        source = node.args[0]
        number = _factor(node)
        if number is not None:
            factor *= number
        elif not (_widens(node) or node.target in _VIEWS or node.target is aten.clone.default):
            break
        steps.append(node)
        node = source
        # Views below the last upcast stay in the graph: the op reads through strides.
        if steps[-1].target not in _VIEWS:
            leaf, taken, taken_factor = source, len(steps), factor
    return Side(leaf, tuple(reversed(steps[:taken])), taken_factor)


def viewed_again(graph: Graph, node: Node, steps: tuple[Node, ...]) -> Node:
    """The views among `steps`, done on another tensor of the same shape."""
    for step in steps:
        if step.target in _VIEWS and not isinstance(step.target, str):
            node = rewrite.call(graph, step.target, node, *step.args[1:], **step.kwargs)
    return node


def is_move(node: Node) -> bool:
    """Is `node` a view that keeps every element once?"""
    return node.target in _MOVES


def _is_head_count(n: object) -> bool:
    return isinstance(n, int) and FEWEST_HEADS <= n <= MOST_HEADS


def _is_parameter(node: Node) -> bool:
    """Is `node` (a part of) a matrix that is an input of the graph?"""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        known = node.target in semantics.VIEWS | semantics.CASTS | semantics.COPIES or _factor(node) is not None
        if not known and node.target is not operator.getitem:
            return False
        node = node.args[0]
    value = node.meta.get("val")
    return node.op in ("placeholder", "get_attr") and isinstance(value, torch.Tensor) and value.dim() == 2


def without_views(node: Node) -> Node:
    """The tensor below the views that keep or repeat its elements."""
    while node.target in _VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _single(node: Node) -> bool:
    """Is there but one matrix in the batch?"""
    batches = node.meta["val"].shape[0]
    return isinstance(batches, int) and batches == 1


def _repeats(node: Node) -> bool:
    """Is the first axis one that an `expand` made from a single matrix?"""
    if node.target is not aten.expand.default:
        return False
    source = node.args[0]
    assert isinstance(source, Node)
    return source.meta["val"].dim() == 2 or (_single(source) and not _single(node))


def _widens(node: Node) -> bool:
    """Is `node` a cast from a float type to one that holds all its values?"""
    if node.target not in semantics.CASTS:
        return False
    source = node.args[0]
    assert isinstance(source, Node)
    old, new = source.meta["val"].dtype, node.meta["val"].dtype
    return old in FLOATS and (new == old or new == torch.float32)


def _factor(node: Node) -> float | None:
    """The number that `node` multiplies its first argument by, where it may be moved behind the product.

    Powers of two change no rounding. Others are moved out of float32 operands only, where the product rounds more.
    """
    if node.target not in _FACTORS or len(node.args) != 2 or node.kwargs:
        return None
    number = node.args[1]
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number) or not number:
        return None
    exact = abs(math.frexp(number)[0]) == 0.5
    if not exact and node.meta["val"].dtype != torch.float32:
        return None
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    return 1.0 / number if divides else float(number)
