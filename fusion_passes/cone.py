"""Backward cones: the pointwise, view, cast and pad nodes that a value is made of, down to its leaves."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection

import torch
from torch.fx import Node

from fusion_passes import aten
from fusion_passes.fusion import NearMiss
from fusion_passes.views import is_alias

# Nodes that Inductor computes on the fly inside a consumer's kernel.
TRANSPARENT: frozenset[object] = (
    frozenset(aten.POINTWISE)
    | frozenset(aten.TUPLES)
    | aten.VIEWS
    | aten.CASTS
    | aten.COPIES
    | aten.FILLS
    | {torch.ops.aten.cat.default, torch.ops.aten.stack.default}
)

# Nodes that only rename, move or widen values: what remains of a leaf after them is still the leaf's value.
_CARRIERS: frozenset[object] = aten.VIEWS | aten.CASTS | aten.COPIES


@dataclasses.dataclass
class Cone:
    """The nodes between `root` and its leaves.

    Attributes:
        root: the node walked back from; part of the interior unless it is a leaf itself.
        interior: every node whose value the root is computed from, leaves excluded.
        leaves: tensors at which the walk ended, in the order they were met.
    """

    root: Node
    interior: set[Node]
    leaves: list[Node]


def backward(root: Node, stop: Collection[Node] = (), limit: int = 80) -> Cone:
    """Walk from `root` to the tensors that are computed by something else than pointwise and view nodes.

    Nodes in `stop` count as leaves. Constants (fills, iotas) belong to the interior.

    Raises:
        NearMiss: the cone has more than `limit` nodes.
    """
    interior: dict[Node, None] = {}
    leaves: dict[Node, None] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node in interior or node in leaves:
            continue
        if node in stop or not is_transparent(node):
            if isinstance(node.meta.get("val"), torch.Tensor):
                leaves[node] = None
            continue
        interior[node] = None
        if len(interior) > limit:
            raise NearMiss(f"its inputs are computed by more than {limit} pointwise and view nodes")
        stack += reversed(node.all_input_nodes)
    return Cone(root, set(interior), list(leaves))


def is_transparent(node: Node) -> bool:
    """Does Inductor compute this node inside the kernel of its consumer?"""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and (source.target in aten.SPLITS or source.target in aten.TUPLES)
    return node.target in TRANSPARENT


def computes(node: Node) -> bool:
    """Is `node` arithmetic, rather than a view, a copy, a cast or a constant?"""
    return node.op == "call_function" and node.target in aten.POINTWISE


def carries(node: Node, leaf: Node) -> bool:
    """Is `node` the leaf itself or only views, copies and casts of it?"""
    while node is not leaf:
        if not (is_transparent(node) and (node.target in _CARRIERS or node.target is operator.getitem)):
            return False
        source = node.args[0]
        if not isinstance(source, Node):
            return False
        node = source
    return True


def last_alias(leaf: Node, interior: Collection[Node]) -> Node:
    """The view of `leaf` furthest towards the root that still shares its memory, along a single chain of views.

    Reading that view costs nothing, and leaves fewer coordinates to be unravelled.
    """
    node = leaf
    while True:
        onward = [user for user in node.users if user in interior]
        if len(onward) != 1 or not isinstance(onward[0].meta.get("val"), (torch.Tensor, list, tuple)):
            return node if isinstance(node.meta["val"], torch.Tensor) else leaf
        user = onward[0]
        if user.target not in aten.VIEWS and user.target is not operator.getitem:
            return node
        if isinstance(user.meta["val"], torch.Tensor) and not is_alias(user, leaf):
            return node
        node = user
