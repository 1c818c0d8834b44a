"""Where packing an MLA key pays: between tensors that are in memory whether or not it is packed."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch._inductor.lowering import fallbacks
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes import cone
from fusion_passes.fusion import Reason, Site
from fusion_passes.views import is_alias

aten = torch.ops.aten

# Calls of libraries that Inductor has lowerings for.
_LIBRARY = frozenset({aten.convolution.default, aten._scaled_mm.default, aten._int_mm.default})

_FOLDED = frozenset(semantics.FOLDS) | semantics.SCANS


def computed_leaf(site: Site) -> Reason:
    """An operand that Inductor would compute inside the kernel, and that the fused op would force to memory."""
    for name, leaf in site.leaves.items():
        owner = _owner(leaf)
        if not in_memory(owner) and not _kept(owner, site.interior):
            what = getattr(owner.target, "__name__", str(owner.target)).split(".")[0]
            return (
                f"{name} is computed by {owner.name} ({what}), which Inductor fuses with the key; the fused op would "
                "force it to memory"
            )
    return None


def in_memory(node: Node) -> bool:
    """Is the value of `node` written to memory in any case, by a library, a foreign kernel or the caller?"""
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return in_memory(node.args[0])
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return True
    if node.target.namespace not in ("aten", "prims"):
        return True
    return node.target in semantics.PRODUCTS or node.target in _LIBRARY or node.target in fallbacks


def _owner(node: Node) -> Node:
    """The node that computed the memory that a view shows."""
    owner = node
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
        if node.target in semantics.SPLITS:
            continue
        if not is_alias(owner, node):
            break
        owner = node
    return owner


def _kept(owner: Node, interior: set[Node]) -> bool:
    """Does anything outside of the key need the tensor in memory?"""
    return any(
        user.op == "output" or not (cone.is_transparent(user) or user.target in _FOLDED)
        for user in _readers(owner)
        if user not in interior
    )


def _readers(node: Node) -> Iterator[Node]:
    """The users of a tensor and of its views."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            value = user.meta.get("val")
            views = user.target in semantics.SPLITS or (isinstance(value, torch.Tensor) and is_alias(user, node))
            if user.op != "output" and views and user.target is not aten.copy_.default:
                pending.append(user)
            else:
                yield user


def fusible_consumer(root: Node) -> Reason:
    """Consumers with which Inductor would fuse the result, so that nothing is written to memory."""
    readers = list(_readers(root))
    fused = [user for user in readers if user.op != "output" and (cone.is_transparent(user) or user.target in _FOLDED)]
    if readers and len(fused) == len(readers):
        what = getattr(fused[0].target, "__name__", str(fused[0].target)).split(".")[0]
        return f"its only consumers, such as {fused[0].name} ({what}), are work that Inductor fuses with it"
    return None


def written_in_place(site: Site) -> Reason:
    """The result is copied to a tensor of the caller, which stock Inductor writes directly."""
    for root in site.outputs:
        for user in _readers(root):
            if user.target is aten.copy_.default:
                return f"it is written into a tensor of the caller ({user.args[0]}), which Inductor does in place"
    return None
