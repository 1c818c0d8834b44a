"""What must hold of a subgraph for agreement at sampled places to prove its meaning everywhere.

Samples say nothing about an element that none of them reads, nor about a value that none of them draws. They are
enough for subgraphs that treat all elements alike and all values alike. These checks establish that from the operators,
and say where it does not hold; a fusion whose subgraphs have thresholds or padding makes up for it by draws on both
sides of every threshold, and by walking every axis.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.evaluate import Evaluator, constant
from fusion_passes.fusion import NearMiss
from fusion_passes.sizes import Sizes
from fusion_passes.views import concrete_tensors

aten, prims = torch.ops.aten, torch.ops.prims

# Elements of a constant that is looked at whole.
MOST_UNIFORM = 2**16

# Operators that give each element its own meaning, or may do so.
UNEVEN: frozenset[object] = (
    semantics.PADS | semantics.RAMPS | semantics.SCATTERS | {aten.index.Tensor, aten._unsafe_index.Tensor}
) - {aten.copy.default}

_SUMS = frozenset({
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar,
    aten.mul.Tensor, aten.mul.Scalar, aten.neg.default, aten.addcmul.default, prims.add.default, prims.sub.default,
    prims.mul.default, prims.fma.default, aten.lerp.Tensor, aten.lerp.Scalar, aten.cat.default, aten.stack.default,
    aten.copy.default,
})  # fmt: skip
_QUOTIENTS = frozenset({aten.div.Tensor, aten.div.Scalar, prims.div.default})


def dependents(sources: Collection[Node], interior: Collection[Node]) -> frozenset[Node]:
    """`sources` and every node of the interior whose values depend on one of them."""
    found = set(sources)
    for node in sorted(interior):
        if node.target not in semantics.FILLS and found.intersection(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def check_linear(sources: Collection[Node], interior: Collection[Node], choices: bool = False) -> None:
    """Whatever depends on `sources` is a sum, a product, a cast or a view; with `choices`, one made by something else.

    Such a subgraph is a polynomial in its sources, for each outcome of the choices: random draws decide what it is for
    all values.

    Raises:
        NearMiss: something compares, bounds or bends the values.
    """
    ours = dependents(sources, interior)
    moves = semantics.VIEWS | semantics.COPIES | semantics.CASTS
    for node in sorted(ours - set(sources)):
        if node.target in _SUMS or node.target in moves or node.target not in semantics.POINTWISE:
            continue
        if node.target in semantics.SELECTIONS:
            free = choices and node.args[semantics.SELECTIONS[node.target][0]] not in ours
        else:
            free = node.target in _QUOTIENTS and node.args[1] not in ours
        if not free:
            raise NearMiss(f"{node.name} ({node.target}) treats some values otherwise than others")


def check_even(nodes: Collection[Node]) -> None:
    """No operator among `nodes` gives some elements another meaning than others by their position.

    Raises:
        NearMiss: one pads, masks a triangle, writes a part, counts positions or looks them up.
    """
    for node in sorted(nodes):
        if node.target in UNEVEN:
            raise NearMiss(f"{node.name} ({node.target}) treats some elements otherwise than others")


def check_constants(nodes: Collection[Node], leaves: Collection[Node], assignments: Sequence[Sizes]) -> None:
    """Constants that `nodes` combine are the same number everywhere, but for `leaves`, which are drawn.

    Raises:
        NearMiss: one differs from place to place, as what is made of positions may.
    """
    inputs = {source for node in nodes if node not in leaves for source in node.all_input_nodes}
    for source in sorted(inputs - {*nodes, *leaves}):
        if any(constant(source, sizes) and not uniform(source, sizes) for sizes in assignments):
            raise NearMiss(f"{source.name} ({source.target}) is a constant that differs from place to place")


def uniform(node: Node, sizes: Sizes) -> bool:
    """Is every element the same number, as sizes alone decide? Larger tensors than `MOST_UNIFORM` must be fills."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return True
    if node.target in semantics.FILLS and node.target not in semantics.RAMPS | semantics.EMPTIES:
        return True
    count = sizes.numel(node)
    if not 0 < count <= MOST_UNIFORM or node.target in semantics.RAMPS or not constant(node, sizes):
        return False
    with concrete_tensors():
        values = Evaluator({}, sizes).values(node, torch.arange(count))
    return bool((values == values[0]).all())


def check_read(evaluator: Evaluator, root: Node) -> None:
    """Every node that `root` is made of has been evaluated somewhere: no part of it was passed over.

    Raises:
        NearMiss: a part, such as a single row that is computed otherwise, may differ from the rest.
    """
    pending, seen = [root], {root}
    while pending:
        node = pending.pop()
        if node in evaluator.leaves:
            continue
        if isinstance(node.meta.get("val"), torch.Tensor) and not evaluator.has_read(node):
            raise NearMiss(f"{node.name} ({node.target}) is a part of it that no sample reads")
        inputs = () if node.target in semantics.FILLS else node.all_input_nodes
        if node.target is aten.copy.default:
            inputs = [n for n in node.args[1:2] if isinstance(n, Node)]
        new = [n for n in inputs if n not in seen and isinstance(n.meta.get("val"), (torch.Tensor, tuple, list))]
        seen.update(new)
        pending += new
