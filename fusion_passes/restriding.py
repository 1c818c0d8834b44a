"""Other strides for a value that is cut from a padded product, where nothing that reads it can tell.

What remains of a padded product has gaps in memory that the model never asked for. A fused op that takes its place has
none. Views of it, and whatever computes values from it, then have other strides too, or none that differ.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
from torch._dynamo.utils import detect_fake_mode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves, tree_map_only

from fusion_passes import aten as semantics
from fusion_passes.fusion import Reason

aten = torch.ops.aten

# Key of Node.meta that marks what stands for a padded product.
CUT = "fusion_passes_cut"

# Operators whose arguments or results say where in memory an element lies.
_BY_ADDRESS = frozenset({
    aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default, aten._reshape_alias.default,
})  # fmt: skip


def is_cut(node: Node) -> bool:
    """Is `node` what remains of a padded product, or a view of that?"""
    while node.target in semantics.VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return CUT in node.meta


def follow(made: Node, old: Node) -> tuple[dict[Node, Any], Reason]:
    """The values (fake ones) that the readers of `old` have if they read `made`, where their strides differ.

    The second element says why `made`, whose strides are others, must not take the place of `old`.
    """
    values: dict[Node, Any] = {old: made.meta["val"]}
    mode = detect_fake_mode([made.meta["val"]])
    with mode if mode is not None else contextlib.nullcontext():
        pending = sorted(old.users)
        while pending:
            node = pending.pop(0)
            if CUT in node.meta or node in values:
                continue  # the strides of a product are its own
            if node.op == "output" and "original_output_strides" in node.meta:
                continue  # Inductor restores them
            if not _computes(node):
                return {}, f"{node.name} ({node.target}) may depend on them"
            value = _again(node, values)
            if not _same_strides(value, node.meta["val"]):
                values[node] = value
                pending = sorted({*pending, *node.users})
    del values[old]
    return values, None


def _computes(node: Node) -> bool:
    """Is `node` an operator that reads values of whatever strides?"""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace not in ("aten", "prims"):
        return False
    writes = node.target._schema.is_mutable and node.target is not aten.copy_.default
    return not writes and node.target not in _BY_ADDRESS


def _again(node: Node, values: dict[Node, Any]) -> Any:
    args, kwargs = tree_map_only(Node, lambda n: values.get(n, n.meta["val"]), (node.args, node.kwargs))
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _same_strides(a: Any, b: Any) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(
        statically_known_true(n == 1) or statically_known_true(x == y)
        for one, other in pairs
        if isinstance(one, torch.Tensor)
        for n, x, y in zip(one.shape, one.stride(), other.stride())
    )
