"""The structure of an index score: products of queries and keys, an activation, and sums over heads.

A *term* is one sum over heads: a `sum` of weighted products, a matrix product with the weights as a row or column, or
a single weighted product where the heads are a loop. Nothing is said here about values; `_index_proof` does that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import aten as semantics
from fusion_passes import cone
from fusion_passes.fusion import NearMiss
from fusion_passes.premises import dependents
from fusion_passes.sizes import Sizes
from fusion_passes.views import axis_of

aten, prims = torch.ops.aten, torch.ops.prims

MATMULS = frozenset({aten.mm.default, aten.bmm.default})
SUMS = frozenset({aten.sum.dim_IntList, aten.mean.dim})
# Pointwise nodes that are linear, and no activation.
ADDITIONS = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar})
SCALINGS = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default})
MOST_NODES = 2000


@dataclasses.dataclass(frozen=True)
class Term:
    """One sum over heads.

    Attributes:
        total: the last node before the term meets another one.
        reduction: the node that sums; None for a single head.
        summands: the tensor with an axis of heads, None for a single head.
        head_axis: that axis.
        weights: the other operand of the product that sums, and `weight_axis` its axis of heads; None if there is none.
        products: the matrix products of queries and keys, one for each head or one for all.
        nodes: what depends on the products, up to `total`.
    """

    total: Node
    reduction: Node | None
    summands: Node | None
    head_axis: int
    weights: Node | None
    weight_axis: int
    products: tuple[Node, ...]
    nodes: frozenset[Node]

    def heads(self, sizes: Sizes) -> int:
        return 1 if self.summands is None else sizes.shape(self.summands)[self.head_axis]


@dataclasses.dataclass(frozen=True)
class Structure:
    """Where the scores are made.

    Attributes:
        base: the first node that holds sums over all heads.
        terms: the sums that add up to it, in the order of the graph.
        nodes: what depends on products of queries and keys, up to and including `base`.
    """

    base: Node
    terms: tuple[Term, ...]
    nodes: frozenset[Node]

    @property
    def products(self) -> list[Node]:
        return [product for term in self.terms for product in term.products]


def candidates(root: Node, sizes: Sizes) -> Iterator[Structure]:
    """Structures that end at or before `root`, likely ones first; nothing where there is no likeness at all.

    Raises:
        NearMiss: there is something like one that no kernel computes.
    """
    whole = cone.backward(root, limit=MOST_NODES)
    count = sizes.numel(root)
    found = sorted(leaf for leaf in whole.leaves if sizes.numel(leaf) == count)
    summed = [term for leaf in found if (term := _summed(leaf, sizes)) is not None]
    if summed:
        yield _joined(summed, whole.interior, sizes)
    singles = [_single(leaf) for leaf in found if leaf.target in MATMULS and _activated(leaf, whole.interior)]
    if len(singles) > 1:
        yield _joined(singles, whole.interior, sizes)


def _single(product: Node) -> Term:
    return Term(product, None, None, 0, None, 0, (product,), frozenset({product}))


def _joined(starts: Sequence[Term], interior: Collection[Node], sizes: Sizes) -> Structure:
    """The terms, each up to the node before it meets another one, and where they have all met."""
    if len({term.heads(sizes) for term in starts}) > 1:
        raise NearMiss("its heads are summed up in groups of different sizes")
    nodes = set().union(*(term.nodes for term in starts))
    if len(starts) == 1:
        return Structure(starts[0].total, tuple(starts), frozenset(nodes))
    members: dict[Node, set[int]] = {term.total: {i} for i, term in enumerate(starts)}
    totals = [term.total for term in starts]
    grown: list[set[Node]] = [set(term.nodes) for term in starts]
    base = None
    for node in sorted(interior):
        if node in members:
            continue
        held = set().union(*(members.get(source, set()) for source in node.all_input_nodes))
        if not held:
            continue
        members[node] = held
        nodes.add(node)
        if len(held) == 1:
            (which,) = held
            totals[which] = node
            grown[which].add(node)
        elif len(held) == len(starts):
            base = node
            break
    if base is None:
        raise NearMiss("the sums over its heads are not added up")
    terms = (
        dataclasses.replace(term, total=total, nodes=frozenset(some))
        for term, total, some in zip(starts, totals, grown)
    )
    return Structure(base, tuple(terms), frozenset(nodes))


def _summed(node: Node, sizes: Sizes) -> Term | None:
    """The term that `node` is, if it sums up activated products."""
    if node.target in SUMS:
        call = semantics.arguments(node)
        source, dims = call["self"], call["dim"]
        nodes, products = _below(source, sizes)
        if products and len(dims) == 1:
            axis = axis_of(dims[0], len(sizes.shape(source)))
            return Term(node, node, source, axis, None, 0, products, nodes | {node})
    elif node.target in MATMULS:
        left, right = node.args[:2]
        assert isinstance(left, Node) and isinstance(right, Node)
        rank = len(sizes.shape(node))
        rows, columns = node.meta["val"].shape[-2:]
        # the weights are a row or a column
        for source, axis, weights, weight_axis, length in (
            (right, rank - 2, left, rank - 1, rows), (left, rank - 1, right, rank - 2, columns),
        ):  # fmt: skip
            nodes, products = _below(source, sizes) if statically_known_true(length == 1) else (frozenset(), ())
            if products:
                return Term(node, node, source, axis, weights, weight_axis, products, nodes | {node})
    return None


def _below(source: Node, sizes: Sizes) -> tuple[frozenset[Node], tuple[Node, ...]]:
    """The matrix products that all elements of `source` are made of, if they are activated, and what depends on them.

    One product with an element for each of the source, or several alike that are put together.
    """
    part = cone.backward(source, limit=MOST_NODES)
    counts = {leaf: sizes.numel(leaf) for leaf in part.leaves if leaf.target in MATMULS}
    total = sizes.numel(source)
    products = [product for product, count in counts.items() if count == total]
    if not products and counts:
        products = [product for product, count in counts.items() if count == max(counts.values())]
        if len(products) * max(counts.values()) != total:
            return frozenset(), ()
    activated = [product for product in products if _activated(product, part.interior)]
    if len(activated) > 1 and counts[activated[0]] == total:
        return frozenset(), ()
    return dependents(activated, part.interior), tuple(sorted(activated))


def _activated(product: Node, interior: Collection[Node]) -> bool:
    """Does anything but a factor or a sum act on the product?"""
    linear = SCALINGS | ADDITIONS
    return any(cone.computes(n) and n.target not in linear for n in dependents((product,), interior))
