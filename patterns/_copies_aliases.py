"""Which nodes may share memory, now or after Inductor has removed what does nothing.

Torch's fake tensors cannot tell: a pass that removes a copy leaves the metadata of the copy's users as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch._inductor.fx_passes.post_grad import noop_registry
from torch.fx import Node

from fusion_passes.patterns._copies_values import CLONES, INDEX_PUTS, SCATTERS
from fusion_passes.views import is_view

aten = torch.ops.aten

_OF_INTEGERS = (aten.ceil.default, aten.floor.default, aten.round.default, aten.trunc.default)


def is_dead(node: Node) -> bool:
    """Is `node` without use, such as a view that a write went through?"""
    return node.op == "call_function" and not node.is_impure() and all(map(is_dead, node.users))


def is_mutation(node: Node) -> bool:
    """Does `node` write into one of its inputs?"""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_split(node: Node) -> bool:
    """Are the elements of the node's value views of its input?"""
    return any(user.target is operator.getitem and is_view(user) for user in node.users)


def uses(node: Node) -> Iterator[Node]:
    """The users of a node; of a split its pieces, which are views of the node."""
    for user in node.users:
        yield from user.users if is_split(user) else (user,)


def may_be_view(node: Node) -> bool:
    """May the node share memory with its first input, once Inductor has removed what does nothing?"""
    target = node.target
    if target in CLONES or is_view(node) or is_split(node):
        return True
    if isinstance(target, torch._ops.OpOverload) and any(result.alias_info for result in target._schema.returns):
        return True
    return target in noop_registry and _may_do_nothing(node)


def _may_do_nothing(node: Node) -> bool:
    """The form of the result allows that the node is removed as a no-op."""
    value = node.meta.get("val")
    sources = [n.meta.get("val") for n in node.all_input_nodes]
    if node.target in _OF_INTEGERS and isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
        return False
    if not isinstance(value, torch.Tensor):
        return True
    return any(isinstance(s, torch.Tensor) and s.dtype == value.dtype and s.dim() == value.dim() for s in sources)


def aliases(node: Node) -> set[Node]:
    """The node and all that may be views of it."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        last = stack.pop()
        if last not in found:
            found.add(last)
            stack += [user for user in last.users if may_be_view(user)]
    return found


def roots(node: Node) -> set[Node]:
    """Where the memory of a node may come from: inputs and results of computations.

    A functional write counts as its target, because Inductor may make it in place.
    """
    found: set[Node] = set()
    seen: set[Node] = set()
    stack = [node]
    while stack:
        last = stack.pop()
        if last in seen:
            continue
        seen.add(last)
        # Sizes are inputs too, but no memory.
        sources = [n for n in _memory(last) if not isinstance(n.meta.get("val"), (int, torch.SymInt))]
        stack += sources
        if not sources:
            found.add(last)
    return found


def _memory(node: Node) -> list[Node]:
    if node.op != "call_function":
        return []
    if node.target in SCATTERS or node.target in INDEX_PUTS or may_be_view(node):
        return list(node.all_input_nodes)
    if node.target is operator.getitem:
        # A functionalised operator: which of its inputs it writes does not matter here.
        source = node.args[0]
        functionalized = isinstance(source, Node) and isinstance(source.target, torch._ops.HigherOrderOperator)
        return [n for n in source.all_input_nodes if n.op != "get_attr"] if functionalized else []  # type: ignore
    return []
