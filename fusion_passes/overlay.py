"""Laying the operators of a small traced graph over those of a large one: where could the small one lie?

Only operators that compute something are compared. Views, casts, copies and multiplications by a number are passed over
on both sides, and operands that commute are tried in both orders, so that the answer is a proposal: which node may be
the result, and which may be the leaves. Whether the values agree is for the caller to prove.

Samples cannot prove where a threshold lies. A pattern that holds an operator with one is therefore laid only where all
numbers are the same, those of multiplications included.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusion_passes import aten as semantics
from fusion_passes.fusion import NearMiss

aten, prims = torch.ops.aten, torch.ops.prims

# What keeps every element, perhaps at another place, in another dtype or more than once.
CARRIERS: frozenset[object] = (
    semantics.RESHAPES | semantics.COPIES | semantics.CASTS
    | {aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default}
    | {prims.transpose.default, prims.broadcast_in_dim.default}
)  # fmt: skip

# With one tensor and one number among the operands these move or scale every element alike.
_AFFINE = frozenset({aten.mul, aten.div, aten.add, aten.sub, aten.rsub, aten.neg})
_COMMUTING = frozenset(
    {aten.mul, aten.add, aten.maximum, aten.minimum, aten.logical_and, aten.logical_or, aten.eq, aten.ne}
)
# In about every graph: a search that starts from one of these would start everywhere.
_COMMON = _AFFINE | {aten.where, aten.sum, aten.pow}

# Analytic: what agrees on a range agrees everywhere. All others may have a threshold that no sample comes near.
_SMOOTH: frozenset[object] = _AFFINE | frozenset(
    {getattr(aten, name) for name in "exp exp2 expm1 log log1p log2 sqrt rsqrt reciprocal erf erfc".split()}
    | {getattr(aten, name) for name in "sin cos tanh sinh cosh sigmoid silu gelu pow square".split()}
)

_MOST_USERS = 64  # nodes looked at on the way from an anchor to the result
_MOST_RESULTS = 8
_MOST_LEAVES = 6


@dataclasses.dataclass(frozen=True)
class Overlay:
    """A proposal.

    Attributes:
        root: the node that the last operator of the pattern lies on.
        leaves: for each parameter of the pattern the nodes that may stand for it, those furthest from `root` first.
    """

    root: Node
    leaves: dict[Node, list[Node]]


Factors = list[tuple[str, list[tuple[str, Any]]]]


@dataclasses.dataclass(frozen=True)
class _Laid:
    """What is laid so far.

    Attributes:
        read: for each parameter the places where it is read, each with the factors that the pattern puts before it.
        covered: the nodes of the graph that an operator of the pattern lies on.
        exact: whether factors have to be the same.
    """

    read: Mapping[Node, tuple[tuple[Node, Factors], ...]]
    covered: frozenset[Node]
    exact: bool


def rarest(result: Node, name: str) -> Node:
    """The operator of a pattern that is met least often in other graphs.

    Raises:
        ValueError: the pattern consists of views, casts and multiplications by numbers alone.
    """
    found: list[Node] = []
    seen, stack = set(), [result]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack += node.all_input_nodes
        if node.op == "call_function" and _through(node) is None and _number(node) is None:
            found.append(node)
    if not found:
        raise ValueError(f"fusion {name!r}: the search function holds no operator to start a search from")
    return min(found, key=lambda node: _packet(node) in _COMMON)


def overloads(anchor: Node) -> tuple[torch._ops.OpOverload, ...]:
    """The overloads of the anchor's operator whose meaning is known."""
    packet: Any = _packet(anchor)
    every = [getattr(packet, name) for name in packet.overloads()]
    return tuple(op for op in every if op in semantics.POINTWISE or op in semantics.FOLDS or op is anchor.target)


def candidates(result: Node, anchor: Node) -> Iterator[Overlay]:
    """Every way to lay the pattern that ends in `result` over the graph so that it covers `anchor`."""
    last = _passed(result)[-1]
    exact = any(n.target in semantics.POINTWISE and _packet(n) not in _SMOOTH for n in result.graph.nodes)
    for root in _users(anchor):
        for laid in _lay(last, root, _Laid({}, frozenset(), exact)):
            if anchor in laid.covered:
                leaves = {parameter: _common(places, exact) for parameter, places in laid.read.items()}
                if all(leaves.values()):
                    yield Overlay(root, leaves)


def results(root: Node) -> list[Node]:
    """The node itself and what only moves or scales it afterwards, the furthest first."""
    found, queue = [root], [root]
    while queue and len(found) < _MOST_RESULTS:
        node = queue.pop(0)
        onward = [user for user in node.users if _through(user) is node]
        found += onward
        queue += onward
    return found[::-1]


def between(root: Node, leaves: Collection[Node]) -> set[Node]:
    """Every node that `root` is computed from, down to the leaves.

    Raises:
        NearMiss: something else than the leaves is read as well.
    """
    found: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node in found or node in leaves:
            continue
        if node.op != "call_function":
            raise NearMiss(f"it reads {node.name} as well")
        found.add(node)
        if node.target not in semantics.FILLS:  # a tensor argument lends its shape only
            stack += [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, tuple, list))]
    if root not in found:
        raise NearMiss("nothing is computed between its leaves and its result")
    return found


def _users(anchor: Node) -> Iterator[Node]:
    """The anchor and the nodes computed from it, nearest first."""
    seen, queue = {anchor}, [anchor]
    while queue:
        node = queue.pop(0)
        yield node
        onward = [user for user in node.users if user not in seen and user.op == "call_function"]
        onward = onward[: _MOST_USERS - len(seen)]
        seen.update(onward)
        queue += onward


def _lay(pattern: Node, node: Node, laid: _Laid) -> Iterator[_Laid]:
    """Lay `pattern` and what it is computed from over `node`."""
    before, behind = _passed(pattern), _passed(node)
    pattern = before[-1]
    if pattern.op == "placeholder":
        place = (node, _factors(before))
        yield dataclasses.replace(laid, read={**laid.read, pattern: (*laid.read.get(pattern, ()), place)})
        return
    node = behind[-1]
    if laid.exact and _factors(before) != _factors(behind):
        return
    if node.op != "call_function" or _packet(pattern) != _packet(node) or not _same_numbers(pattern, node):
        return
    wanted, given = _operands(pattern), _operands(node)
    if len(wanted) != len(given):
        return
    laid = dataclasses.replace(laid, covered=laid.covered | {node})
    orders = [given, given[::-1]] if len(given) == 2 and _packet(node) in _COMMUTING else [given]
    for order in orders:
        yield from _lay_all(wanted, order, laid)


def _lay_all(wanted: Sequence[Node], given: Sequence[Node], laid: _Laid) -> Iterator[_Laid]:
    if not wanted:
        yield laid
        return
    for first in _lay(wanted[0], given[0], laid):
        yield from _lay_all(wanted[1:], given[1:], first)


def _common(places: Sequence[tuple[Node, Factors]], exact: bool) -> list[Node]:
    """The nodes through which all the places read the same tensor, the furthest from the places first."""
    chains = []
    for place, wanted in places:
        chain = _passed(place)
        chains.append([n for i, n in enumerate(chain) if not exact or _factors(chain[: i + 1]) == wanted])
    shared = [node for node in chains[0] if all(node in chain for chain in chains[1:])]
    return shared[::-1][:_MOST_LEAVES]


def _factors(chain: Sequence[Node]) -> Factors:
    """The numbers that the nodes of a chain but the last scale by or add, in order."""
    scaling = (node for node in chain[:-1] if _packet(node) in _AFFINE)
    return [(str(_packet(node)), _numbers(node)) for node in scaling]


def _passed(node: Node) -> list[Node]:
    """`node` and what is behind it as far as elements are only moved or scaled."""
    chain = [node]
    while (source := _through(chain[-1])) is not None:
        chain.append(source)
    return chain


def _through(node: Node) -> Node | None:
    """The tensor that `node` only moves or scales, else None."""
    if node.op != "call_function":
        return None
    if node.target in CARRIERS:
        source = node.args[0]
        return source if isinstance(source, Node) else None
    operands = _operands(node)
    if _packet(node) in _AFFINE and len(operands) == 1 and len(node.all_input_nodes) <= 2:
        value = node.meta.get("val")
        # The number itself divided by a tensor is no scaling.
        first = node.args[0] is operands[0] or _packet(node) is not aten.div
        floating = isinstance(value, Tensor) and bool(value.is_floating_point())
        return operands[0] if first and floating else None
    return None


def _operands(node: Node) -> list[Node]:
    """The tensors among the arguments, without those that are one number."""
    flat: list[Any] = []
    for argument in node.args[:1] * 2 if _squares(node) else node.args:
        flat += argument if isinstance(argument, (list, tuple)) else [argument]
    found = [a for a in flat if isinstance(a, Node) and isinstance(a.meta.get("val"), (Tensor, tuple, list))]
    return [a for a in found if _number(a) is None]


def _number(node: Node) -> float | None:
    """The value of a tensor that holds the same number everywhere, else None."""
    while node.target in CARRIERS and isinstance(node.args[0], Node):
        node = node.args[0]
    value = semantics.fill_of(node)
    return None if value is None else float(value)


def _same_numbers(pattern: Node, node: Node) -> bool:
    """Do pointwise operators compare, clamp or raise to the same numbers? Samples may miss a shifted threshold."""
    if node.target not in semantics.POINTWISE:
        return True
    return _numbers(pattern) == _numbers(node)


def _numbers(node: Node) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    if _squares(node):
        return found
    for name, value in semantics.arguments(node).items():
        number = _number(value) if isinstance(value, Node) else value
        if isinstance(number, (bool, int, float, str)):
            found.append((name, number))
    return found


def _squares(node: Node) -> bool:
    return node.target is aten.square.default or (node.target is aten.pow.Tensor_Scalar and node.args[1:] == (2,))


def _packet(node: Node) -> Any:
    """The operator without its overload; a square is a product."""
    if _squares(node):
        return aten.mul
    if node.target is operator.getitem:
        return (operator.getitem, node.args[1])
    return getattr(node.target, "overloadpacket", node.target)
