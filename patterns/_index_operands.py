"""The tensors that an index score reads: found behind views, casts and dequantisation, and read by head and channel.

Coordinates are those of a *virtual root*: the axes of the scores, then one of heads and one of channels. A product of
queries and keys has an element for every head of a score, and reads its operands along the channels.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes import cone
from fusion_passes.access import AxisMap, trace_access
from fusion_passes.axes import fit_axes
from fusion_passes.estimates import has_tensor
from fusion_passes.evaluate import constant
from fusion_passes.fusion import NearMiss
from fusion_passes.patterns._index_terms import Structure, Term
from fusion_passes.sizes import Sizes, Unsupported
from fusion_passes.views import Coords, concrete_tensors

aten = torch.ops.aten

FLOAT8 = torch.float8_e4m3fn
# Views that move values and hide none.
MOVES = semantics.RESHAPES | {
    aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default, aten.slice.Tensor, aten.select.int,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operand:
    """A side of the products of queries and keys.

    Attributes:
        side: 0 for the left operand of the matrix products, 1 for the right one.
        leaf: the tensor behind all of them.
        scale: what multiplies its rows where it is dequantised; None otherwise.
    """

    side: int
    leaf: Node
    scale: Node | None


def raised(node: Node, through_casts: bool = True) -> Node:
    """The tensor of which `node` shows a part: behind views, copies and, if asked, casts to a wider float."""
    while node.op == "call_function":
        source = node.args[0] if node.args else None
        if not isinstance(source, Node):
            return node
        if node.target is operator.getitem and source.target in semantics.SPLITS:
            source = source.args[0]
            assert isinstance(source, Node)
        elif not (node.target in MOVES or node.target in semantics.COPIES or (through_casts and widens(node))):
            return node
        node = source
    return node


def widens(node: Node) -> bool:
    """Is `node` a cast that keeps every value of a float?"""
    source = node.args[0] if node.args else None
    if node.target not in semantics.CASTS or not isinstance(source, Node):
        return False
    old, new = source.meta["val"].dtype, node.meta["val"].dtype
    if not (old.is_floating_point and new.is_floating_point):
        return False
    return old == new or old.itemsize < new.itemsize


def operands(structure: Structure) -> tuple[Operand, Operand]:
    """Both sides of the products, each behind the narrowest dtype that they have in common.

    Raises:
        NearMiss: the products do not read one tensor on each side.
    """
    sides = [_side(structure, side, True) for side in (0, 1)]
    if sides[0].leaf.meta["val"].dtype != sides[1].leaf.meta["val"].dtype:
        sides = [_side(structure, side, False) for side in (0, 1)]
    return sides[0], sides[1]


def _side(structure: Structure, side: int, through_casts: bool) -> Operand:
    found = set()
    for product in structure.products:
        node = product.args[side]
        assert isinstance(node, Node)
        quantised = _dequantised(side, node) if through_casts else None
        found.add(quantised or Operand(side, raised(node, through_casts), None))
    if len(found) > 1:
        raise NearMiss("the products of its heads read different tensors")
    return found.pop()


def _dequantised(side: int, node: Node) -> Operand | None:
    """The float8 tensor and the scale that a side is the product of."""
    product = raised(node)
    if product.target is not aten.mul.Tensor:
        return None
    factors = [factor for factor in product.args if isinstance(factor, Node)]
    for values, scale in (factors, factors[::-1]) if len(factors) == 2 else ():
        leaf = raised(values)
        if leaf.meta["val"].dtype == FLOAT8 and raised(scale).meta["val"].dtype != FLOAT8:
            return Operand(side, leaf, raised(scale))
    return None


def outside(nodes: Collection[Node], known: Collection[Node], sizes: Sizes) -> list[Node]:
    """What `nodes` read beside one another and `known`: tensors, each behind its views, but for uniform constants."""
    inputs = dict.fromkeys(i for n in sorted(nodes) for i in n.all_input_nodes if i not in nodes and i not in known)
    tensors = [i for i in inputs if isinstance(i.meta.get("val"), torch.Tensor) and not _uniform(i, sizes)]
    return list(dict.fromkeys(map(raised, tensors)))


def _uniform(node: Node, sizes: Sizes) -> bool:
    """Is every element of `node` the same number?"""
    source = raised(node)
    if source.target in semantics.RAMPS or source.target in semantics.EMPTIES:
        return False
    if source.target in semantics.FILLS:
        return True
    return sizes.numel(source) == 1 and constant(source, sizes)


def ends(structure: Structure, bottom: Node) -> list[Node]:
    """Tensors behind which the proof of scores looks no further: those that sums and products read, and masks.

    Constants are none of them, for what they are matters.
    """
    found: dict[Node, None] = {}
    walked, stack = {bottom}, [bottom]
    while stack:
        node = stack.pop()
        inside = node in structure.nodes
        for read in filter(has_tensor, node.all_input_nodes):
            if inside and read not in structure.nodes:
                source = raised(read)
                dequantised = node in structure.products and source.target is aten.mul.Tensor
                found |= dict.fromkeys(map(raised, source.all_input_nodes) if dequantised else [source])
            elif read not in structure.nodes and not cone.is_transparent(read):
                found[read] = None
            elif read not in walked:
                walked.add(read)
                stack.append(read)
    return [end for end in found if end not in walked and not constant(end, None)]


class Reader:
    """Where the scores `root` read products and tensors, under one assignment of sizes."""

    def __init__(self, structure: Structure, root: Node, sizes: Sizes) -> None:
        self.structure, self.root, self.sizes = structure, root, sizes
        self.per_term = structure.terms[0].heads(sizes)
        self.heads = self.per_term * len(structure.terms)
        first = structure.products[0].args[0]
        assert isinstance(first, Node)
        self.width = sizes.shape(first)[-1]
        self.shape = (*sizes.shape(root), self.heads, self.width)

    def map(self, look: Callable[[Coords], Iterable[tuple[Tensor, Coords]]], leaf: Node) -> AxisMap:
        """The axes of a leaf in those of the virtual root.

        Raises:
            NearMiss: some scores do not read the leaf.
            Unsupported: the access is not a composition of axes.
        """
        shape = self.sizes.shape(leaf)

        def whole(coords: Coords) -> tuple[Coords, Tensor]:
            count = coords[0].shape
            found = [torch.zeros(count, dtype=torch.int64) for _ in shape]
            covered = torch.zeros(count, dtype=torch.bool)
            for chosen, places in look([c.expand(count) for c in coords]):
                covered |= chosen
                for axis, place in zip(found, places, strict=True):
                    axis[chosen] = place
            if not bool(covered.all()):
                raise NearMiss(f"some scores do not read {leaf.name}")
            return found, covered

        with concrete_tensors():
            try:
                return fit_axes(whole, self.shape, shape)
            except Unsupported as error:
                raise Unsupported(f"{leaf.name}: {error}") from error

    def products(self, coords: Coords) -> Iterable[tuple[Tensor, Node, Coords]]:
        """(which of the coordinates, product, its coordinates there); each virtual coordinate occurs once."""
        head = coords[-2]
        for index, term in enumerate(self.structure.terms):
            chosen = head // self.per_term == index
            if not bool(chosen.any()):
                continue
            places = self._summands(term, [c[chosen] for c in coords])
            source = term.summands or term.total
            for product in term.products:
                access = trace_access(source, product, places, self.sizes)
                mine = chosen.clone()
                mine[chosen] = access.valid
                yield mine, product, [c[access.valid] for c in access.coords]

    def operand(self, side: Operand, leaf: Node) -> Callable[[Coords], Iterable[tuple[Tensor, Coords]]]:
        """A look at what the products read of a leaf on one side: the operand itself or its scale."""

        def look(coords: Coords) -> Iterable[tuple[Tensor, Coords]]:
            for chosen, product, places in self.products(coords):
                node = product.args[side.side]
                assert isinstance(node, Node)
                channel = coords[-1][chosen]
                *batch, row, column = places
                inner = [*batch, row, channel] if side.side == 0 else [*batch, channel, column]
                yield chosen, self._trace(node, leaf, inner, {side.leaf, side.scale} - {None})

        return look

    def weight(self, leaf: Node) -> Callable[[Coords], Iterable[tuple[Tensor, Coords]]]:
        """A look at what the sums over heads read of a leaf beside the products."""

        def look(coords: Coords) -> Iterable[tuple[Tensor, Coords]]:
            for index, term in enumerate(self.structure.terms):
                chosen = coords[-2] // self.per_term == index
                if not bool(chosen.any()):
                    continue
                mine = [c[chosen] for c in coords]
                if term.weights is not None and raised(term.weights) is leaf:
                    yield chosen, self._trace(term.weights, leaf, self._summands(term, mine, weights=True))
                else:
                    source = term.summands or term.total
                    yield chosen, self._trace(source, leaf, self._summands(term, mine), term.products)

        return look

    def beside(self, leaf: Node) -> Callable[[Coords], Iterable[tuple[Tensor, Coords]]]:
        """A look at what the scores read of a leaf after the sum over heads."""

        def look(coords: Coords) -> Iterable[tuple[Tensor, Coords]]:
            everywhere = torch.ones(coords[0].shape, dtype=torch.bool)
            yield everywhere, self._trace(self.root, leaf, coords[:-2], {self.structure.base})

        return look

    def _summands(self, term: Term, coords: Coords, weights: bool = False) -> Coords:
        """Where scores and heads are in the summands of a term (or in the weights that are multiplied with them)."""
        at = self._trace(self.root, term.total, coords[:-2])
        if term.reduction is None or term.summands is None:
            return at
        at = self._trace(term.total, term.reduction, at)
        head = coords[-2] % self.per_term
        if term.weights is None:
            shape = self.sizes.shape(term.reduction)
            if len(shape) == len(self.sizes.shape(term.summands)):  # keepdim
                at = [*at[: term.head_axis], *at[term.head_axis + 1 :]]
            return [*at[: term.head_axis], head, *at[term.head_axis :]]
        axis = term.weight_axis if weights else term.head_axis
        left = axis == len(at) - 1
        *batch, row, column = at
        return [*batch, row, head] if left else [*batch, head, column]

    def _trace(self, node: Node, leaf: Node, coords: Sequence[Tensor], stop: Collection[Any] = ()) -> Coords:
        # What lies behind the products may depend on the same leaf: a later layer on the mask of all layers.
        if node is leaf:
            return list(coords)
        access = trace_access(node, leaf, coords, self.sizes, stop=stop)
        if not bool(access.valid.all()):
            raise NearMiss(f"some of {leaf.name} is hidden by padding")
        return access.coords
