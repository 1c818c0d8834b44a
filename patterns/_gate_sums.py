"""What is summed up at an anchor, and along which axis: a cumsum, or the product with a triangle of equal numbers.

`tri @ g` with ones on and below the diagonal of `tri` is the cumsum of g along its rows, `g @ tri` with ones on and
above the diagonal the one along its columns. They differ where a gate is infinite: the product multiplies it with the
zeros as well, and is NaN at every position.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import aten as semantics
from fusion_passes.evaluate import Evaluator, constant
from fusion_passes.folding import is_view
from fusion_passes.ops.gate_cumsum import CHUNK_SIZES
from fusion_passes.sizes import Sizes

aten = torch.ops.aten

PRODUCTS = (aten.mm.default, aten.bmm.default)
ANCHORS = (aten.cumsum.default, *PRODUCTS)


@dataclasses.dataclass(frozen=True)
class Sum:
    """`factor` times the sum of `root` over the positions of axis `time` up to one's own."""

    root: Node
    time: int
    factor: float = 1.0


def wanted(anchor: Node) -> bool:
    """A cheap look: a cumsum, or a product with a square matrix that no input of the graph goes into."""
    return anchor.target not in PRODUCTS or any(_is_made(operand) for operand in _operands(anchor))


def summed(anchor: Node, assignments: list[Sizes]) -> Sum | None:
    """The sum at an anchor, the same for all admissible sizes; None where it is another product."""
    value = anchor.meta["val"]
    if anchor.target not in PRODUCTS:
        root = anchor.args[0]
        assert isinstance(root, Node)
        return Sum(root, semantics.arguments(anchor)["dim"] % value.dim()) if value.dim() else None
    left, right = _operands(anchor)
    for matrix, root, time, lower in ((left, right, value.dim() - 2, True), (right, left, value.dim() - 1, False)):
        if not _is_made(matrix):
            continue
        factors = {_triangle(matrix, lower, sizes) for sizes in assignments}
        factor = factors.pop()
        if factor is not None and not factors:
            return Sum(root, time, factor)
    return None


def _operands(product: Node) -> tuple[Node, Node]:
    left, right = product.args[:2]
    assert isinstance(left, Node) and isinstance(right, Node)
    return left, right


def _is_made(matrix: Node) -> bool:
    """Square, as long as a chunk, and made without a tensor that the graph takes in."""
    rows, columns = matrix.meta["val"].shape[-2:]
    square = any(statically_known_true(rows == n) and statically_known_true(columns == n) for n in CHUNK_SIZES)
    return square and constant(matrix, None)


def _triangle(matrix: Node, lower: bool, sizes: Sizes) -> float | None:
    """The number on and to one side of the diagonal of every matrix of a batch, where all else is zero."""
    if not constant(matrix, sizes):
        return None
    size = sizes.shape(matrix)[-1]
    source = matrix
    while is_view(source):
        source = source.all_input_nodes[0]
    # Matrices of a batch are views of one, so that the first and the last stand for all.
    if sizes.numel(source) != size * size:
        return None
    count = sizes.numel(matrix) // (size * size)
    place = torch.arange(size * size)
    first, *others = (
        Evaluator({}, sizes).values(matrix, at * size * size + place).double().reshape(size, size)
        for at in sorted({0, count - 1})
    )
    number = float(first[0, 0])
    wanted = torch.full_like(first, number)
    wanted = wanted.tril() if lower else wanted.triu()
    return number if number and all(torch.equal(found, wanted) for found in (first, *others)) else None
