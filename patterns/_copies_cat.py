"""A `cat` whose pieces are, one after the other, all the parts of a tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch.fx import Node

from fusion_passes.fusion import NearMiss
from fusion_passes.patterns._copies_aliases import is_split
from fusion_passes.patterns._copies_values import CLONES, Value, Values, parts_of, same_content
from fusion_passes.patterns._copies_windows import known, reshaped_strides
from fusion_passes.views import is_view


def joined(cat: Node, values: Values) -> Node | None:
    """The tensor whose parts `cat` puts together again, perhaps of another shape; None if they come from several.

    Raises:
        NearMiss: the pieces are parts of one tensor, but not all of them in their order.
    """
    parts = parts_of(cat)
    found = [values.of(part) for part in parts]
    if not found or any(value.origin is not found[0].origin for value in found):
        return None
    if all(part.op == "placeholder" or not is_view(part) for part in parts):
        return None
    whole = values.of(cat)
    if whole.origin is cat:
        raise NearMiss(f"parts of {found[0].origin.name} are joined that do not follow one another")
    for node in _ancestors(parts):
        if _holds(values.of(node), whole):
            return node
    raise NearMiss(f"the parts of {found[0].origin.name} that are joined are not all of a tensor")


def _holds(value: Value, whole: Value) -> bool:
    """Does a tensor hold the same elements in the same order, whatever its shape?"""
    window = value.window
    strides = reshaped_strides(window.shape, window.strides, whole.window.shape)
    if strides is None:
        return False
    formed = dataclasses.replace(window, shape=whole.window.shape, strides=strides)
    return same_content(dataclasses.replace(value, window=formed), whole)


def same_shape(node: Node, other: Node) -> bool:
    a, b = node.meta["val"].shape, other.meta["val"].shape
    return len(a) == len(b) and all(known(x == y) for x, y in zip(a, b))


def _ancestors(parts: Sequence[Node]) -> list[Node]:
    """What the parts are views of, the nearest first."""
    found: list[Node] = []
    for part in parts:
        node: object = part
        while isinstance(node, Node) and (is_view(node) or node.target in CLONES):
            node = node.args[0]
            # An element of a split is a view of what is split.
            node = node.args[0] if isinstance(node, Node) and is_split(node) else node
            if isinstance(node, Node) and node not in found:
                found.append(node)
    return found
