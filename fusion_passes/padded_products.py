"""Matrix products that Inductor has padded, shown to the fusions as they were.

Before the pass runs, Inductor may have replaced a product whose sizes are no multiple of 8 (4 in float32) by

    p = mm(constant_pad_nd(a, [0, k, 0, m]), constant_pad_nd(b, [0, n, 0, k]));  r = p[:-m, :-n]

Whether it does is decided by a measurement on the GPU, on which no fusion should depend. So while the fusions look at
a graph, a product `mm(a, b)` stands behind r and has its users, and p with its pads and slices is set aside: it reads
placeholders instead of a and b. Afterwards r gets its users back, unless a fused op has taken them: then the padded
product goes as well. A graph in which nothing was fused is what it was, down to the order of every node's users.

The product that stands in has the FakeTensor of r, thus the strides that a reader will really meet.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import aten as semantics
from fusion_passes.restriding import CUT

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.bmm.default)
_NAME = "fusion_passes_unpadded"


@dataclasses.dataclass(frozen=True)
class Padded:
    """A product of zero-padded matrices, from which exactly the padding is cut off again.

    Attributes:
        product: the `mm` or `bmm`.
        readers: for each operand the node that reads it: its pad, or the product itself where it has none.
        cuts: the slices behind the product, in order; none where only the contracted axis is padded.
    """

    product: Node
    readers: tuple[Node, Node]
    cuts: tuple[Node, ...]

    @property
    def result(self) -> Node:
        return self.cuts[-1] if self.cuts else self.product

    @property
    def nodes(self) -> list[Node]:
        """All nodes of it, in graph order."""
        return sorted({*self.readers, self.product, *self.cuts})

    @property
    def operands(self) -> list[Node]:
        """Both operands without their padding."""
        return [_operand(reader, side) for side, reader in enumerate(self.readers)]


@dataclasses.dataclass(frozen=True)
class SetAside:
    """The nodes that no fusion shall look at, while others stand in for them."""

    nodes: frozenset[Node] = frozenset()
    results: frozenset[Node] = frozenset()

    def eliminate_dead_code(self, graph: Graph) -> None:
        """As `Graph.eliminate_dead_code`, which would take what is set aside for dead, and looks at all that is used.

        A pass that fuses many sites calls it after each.
        """
        for node in reversed(graph.nodes):
            if not node.users and node not in self.results and not node.is_impure():
                graph.erase_node(node)


@contextlib.contextmanager
def unpadded(graph: Graph) -> Iterator[SetAside]:
    """Inside the block plain products stand in for the padded ones of a graph, which are set aside."""
    found = [padded for target in _PRODUCTS for node in graph.find_nodes(op="call_function", target=target)
             if (padded := _padded(node)) is not None]  # fmt: skip
    if not found:
        yield SetAside()
        return
    order = {node: tuple(node.users) for node in graph.nodes}
    stand_ins = [_stand_in(graph, padded) for padded in found]
    placeholders = [_cut_off(graph, padded) for padded in found]
    try:
        nodes = frozenset(node for padded, held in zip(found, placeholders) for node in (*padded.nodes, *held))
        yield SetAside(nodes, frozenset(padded.result for padded in found))
    finally:
        for padded, stand_in, held in zip(found, stand_ins, placeholders):
            _put_back(graph, padded, stand_in, held)
        _reorder_users(graph, order)


def _padded(product: Node) -> Padded | None:
    """The product with its pads and slices, if it is a padded one."""
    readers = (_reader(product, 0), _reader(product, 1))
    if readers == (product, product):
        return None
    left, right = (_operand(reader, side).meta["val"].shape for side, reader in enumerate(readers))
    if not statically_known_true(left[-1] == right[-2]):
        return None  # the contracted axis is longer on one side
    wanted = [*left[:-1], right[-1]]
    cuts: list[Node] = []
    node = product
    while not _has_shape(node, wanted):
        users = list(node.users)
        if len(users) != 1 or not _cuts_the_end(users[0]):
            return None
        (node,) = users
        cuts.append(node)
    return Padded(product, readers, tuple(cuts)) if node.users else None


def _reader(product: Node, side: int) -> Node:
    """The pad that adds zeros behind the rows and columns of an operand for this product alone, or the product."""
    operand = _operand(product, side)
    if operand.target is not aten.constant_pad_nd.default or list(operand.users) != [product]:
        return product
    call = semantics.arguments(operand)
    amounts, value = list(call["pad"]), call["value"]
    known = all(isinstance(amount, int) for amount in amounts) and isinstance(value, (int, float))
    plain = known and value == 0 and not any(amounts[0::2]) and not any(amounts[4:]) and min(amounts) >= 0
    return operand if plain else product


def _operand(reader: Node, side: int) -> Node:
    source = reader.args[side if reader.target in _PRODUCTS else 0]
    assert isinstance(source, Node)
    return source


def _has_shape(node: Node, wanted: Sequence[int | torch.SymInt]) -> bool:
    return all(statically_known_true(a == b) for a, b in zip(node.meta["val"].shape, wanted, strict=True))


def _cuts_the_end(node: Node) -> bool:
    """Is `node` a slice that keeps what comes first along an axis?"""
    if node.target is not aten.slice.Tensor:
        return False
    call = semantics.arguments(node)
    return call["start"] in (None, 0) and call["step"] == 1


def _stand_in(graph: Graph, padded: Padded) -> Node:
    """A plain product with the users of the padded one, and with its name for what is reported."""
    product, result = padded.product, padded.result
    with graph.inserting_after(result):
        made = graph.create_node("call_function", product.target, tuple(padded.operands), name=_NAME)
    made.meta = {k: v for k, v in product.meta.items() if k != "tensor_meta"} | {"val": result.meta["val"], CUT: True}
    made.name, product.name = product.name, made.name
    result.replace_all_uses_with(made)
    return made


def _cut_off(graph: Graph, padded: Padded) -> list[Node]:
    """Let the padded product read placeholders, so that it is no user of its operands."""
    made = []
    for reader, operand in zip(padded.readers, padded.operands):
        with graph.inserting_before(padded.nodes[0]):
            made.append(graph.create_node("call_function", placeholder, name=_NAME))
        made[-1].meta = {"val": operand.meta["val"]}
        reader.replace_input_with(operand, made[-1])
    return made


def placeholder() -> None:
    """What a product that is set aside reads."""
    raise RuntimeError("a padded product that was set aside is still in the graph: put it back before running it")


def _put_back(graph: Graph, padded: Padded, stand_in: Node, placeholders: list[Node]) -> None:
    """Give the padded product its operands and users again, or erase it where a fused op has taken its place."""
    alive = set(graph.nodes)
    stand_in.meta.pop(CUT)
    if padded.product not in alive:
        return  # a fusion has cleaned up by itself: the plain product stays
    if not stand_in.users:
        for node in (stand_in, *reversed(padded.nodes)):
            if node in alive:
                graph.erase_node(node)
    else:
        early = False
        for reader, held, operand in zip(padded.readers, placeholders, stand_in.args):
            assert isinstance(operand, Node)
            reader.replace_input_with(held, operand)
            early |= reader < operand
        if early:  # the operand is a fused op now, which needs something computed later
            for node in padded.nodes:
                stand_in.prepend(node)
        stand_in.replace_all_uses_with(padded.result)
        stand_in.name, padded.product.name = padded.product.name, stand_in.name
        graph.erase_node(stand_in)
    for held in placeholders:
        if held in alive and not held.users:
            graph.erase_node(held)


def _reorder_users(graph: Graph, order: dict[Node, tuple[Node, ...]]) -> None:
    """The users of each node in the order in which they were, and behind them those that are new."""
    for node in graph.nodes:
        users = {user: None for user in order.get(node, ()) if user in node.users} | node.users
        if list(users) != list(node.users):
            node.users.clear()
            node.users.update(users)
