"""Subgraphs that are the same but for the names of their nodes, so that the layers of a model cost one proof."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.fx import Node

from fusion_passes.estimates import has_tensor
from fusion_passes.patterns._proofs import Proofs
from fusion_passes.sizes import Sizes

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Likeness:
    """What a subgraph is, apart from the names of its nodes.

    Attributes:
        key: a digest that two subgraphs share only if they are the same operators with the same arguments on values of
            the same shapes, strides and dtypes, under each of as many assignments of sizes: whatever follows from
            these follows for both.
        nodes: the nodes of the subgraph; those of one that is alike come in the same order.
    """

    key: str
    nodes: tuple[Node, ...]

    def proved(self, proofs: Proofs[T], prove: Callable[[], T]) -> T:
        """What `prove` says of this subgraph, or what it said of one that is alike, with the nodes of this one.

        What names other nodes is not remembered.
        """
        places = {node: _Place(i) for i, node in enumerate(self.nodes)}
        try:
            kept: Any = proofs.of(self.key, lambda: _renamed(prove(), places))
        except _Elsewhere:
            return prove()
        found: T = _renamed(kept, {place: node for node, place in places.items()})
        return found


class _Elsewhere(Exception):
    """A node lies outside of the subgraph."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for a node in what is remembered, which must not keep a graph alive."""

    index: int


def _renamed(value: Any, names: Mapping[Any, Any]) -> Any:
    """`value` with other nodes in it."""
    if isinstance(value, (Node, _Place)):
        if value not in names:
            raise _Elsewhere(value)
        return names[value]
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(_renamed(part, names) for part in value)
    if isinstance(value, dict):
        return {_renamed(key, names): _renamed(part, names) for key, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return dataclasses.replace(value, **{f.name: _renamed(getattr(value, f.name), names) for f in fields})
    return value


def likeness(root: Node, leaves: Sequence[Node], assignments: Sequence[Sizes], *more: Any) -> Likeness:
    """What computes `root` from `leaves`, and `more` that tells subgraphs apart."""
    number = {node: i for i, node in enumerate(leaves)}
    ends, stack = len(number), [root]
    while stack:
        node = stack.pop()
        if node not in number and has_tensor(node):
            number[node] = len(number)
            stack += reversed(node.all_input_nodes)

    spelled = speller(number, assignments)
    digest = hashlib.sha256(repr((ends, more)).encode())
    for node, i in number.items():
        digest.update(_described(node.meta["val"], spelled).encode())
        if i >= ends:
            named = [(name, spelled(argument)) for name, argument in node.kwargs.items()]
            digest.update(f"{node.op} {node.target}{spelled(node.args)}{named};".encode())
    digest.update(spelled(root).encode())
    return Likeness(digest.hexdigest(), tuple(number))


def speller(number: Mapping[Node, int], assignments: Sequence[Sizes]) -> Callable[[Any], str]:
    """Arguments as text: nodes by their numbers, others and symbols by their sizes under each assignment."""

    def spelled(argument: Any) -> str:
        if isinstance(argument, (list, tuple)):
            return f"[{','.join(map(spelled, argument))}]"
        if isinstance(argument, Node) and argument in number:
            return f"%{number[argument]}"
        if isinstance(argument, (Node, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return f"size {[sizes.of(argument) for sizes in assignments]}"
        return repr(argument)

    return spelled


def _described(value: Any, spelled: Callable[[Any], str]) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{spelled(tuple(value.shape))}{spelled(value.stride())}{spelled(value.storage_offset())}"
    return f"({','.join(_described(part, spelled) for part in value)})" if isinstance(value, (tuple, list)) else "-"
