"""The subgraph of a chunked delta rule, from the outputs of its chunks back to q, k, v, the gate and beta.

The walk ends at tensors that have one row per token and head. What remains between them and the outputs must be
analytic in its data: sums, products, quotients, exponentials, roots, and selections by constant masks. Two such
functions that agree on random values agree everywhere, so that no rarely taken branch can hide.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from fusion_passes import advice
from fusion_passes import aten as semantics
from fusion_passes.fusion import NearMiss, dtype_name
from fusion_passes.patterns._axis_factors import PLAIN, TIME, Factor, Layout
from fusion_passes.patterns._chunk_assembly import Assembly
from fusion_passes.patterns._likeness import speller
from fusion_passes.patterns._parallel_axes import followed
from fusion_passes.sizes import Sizes

aten, prims = torch.ops.aten, torch.ops.prims

# What to do about other dtypes and roundings inside of the rule.
IN_FLOAT32 = "cast q, k, v, the gate and beta to float32 before the rule, and its results behind it"
MOST_NODES = 65536
_STATE = 1 << 62  # depends on the initial state

_ANALYTIC_NAMES = "add sub mul div neg exp exp2 expm1 sqrt rsqrt reciprocal"
ANALYTIC: frozenset[Any] = frozenset(
    {
        *(getattr(getattr(aten, name), kind) for name in "add sub mul div".split() for kind in ("Tensor", "Scalar")),
        *(getattr(aten, name).default for name in "neg exp exp2 expm1 sqrt rsqrt reciprocal square sigmoid".split()),
        *(getattr(prims, name).default for name in _ANALYTIC_NAMES.split()),
        *(aten.rsub.Tensor, aten.rsub.Scalar, aten.pow.Tensor_Scalar, aten.pow.Scalar, prims.fma.default),
        *(aten.addcmul.default, aten.addcdiv.default, aten.positive.default),
    }
)
_CONTRACTIONS: frozenset[Any] = semantics.REDUCTIONS | {
    aten.linalg_solve_triangular.default,
    aten.linalg_inv_ex.default,
}
_MOVERS: frozenset[Any] = semantics.VIEWS | semantics.COPIES | semantics.CASTS


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor with one row per token and head: [B, T, heads, width], or [B, heads, T, width] with `head_first`.

    `width` is 0 for tensors without a last axis.
    """

    node: Node
    heads: int
    width: int
    head_first: bool


@dataclasses.dataclass
class Region:
    """The nodes between the leaves and the outputs.

    Attributes:
        leaves: token leaves, in the order in which the walk met them.
        state: the initial state [B, H, K, V] that is read, if any.
        nodes: every other node in topological order, those before the state excluded.
        depends: for each node, the leaves that it depends on as a bit mask; 0 for constants.
        roundings: casts to a narrower float that Inductor drops too.
    """

    leaves: list[Leaf]
    state: Node | None
    nodes: list[Node]
    depends: dict[Node, int]
    roundings: list[Node]


Stop = Callable[[Node], Leaf | None]


def token_leaves(batch: int, tokens: int, heads: int, sizes: Sizes, orders: Sequence[bool], single: bool) -> Stop:
    """Tells tensors [B, T, h, D] and [B, T, h] from others, h a divisor of `heads`, or [B, h, T, ...].

    Args:
        orders: whether heads come first; several are tried in order.
        single: a single head may stand for several; otherwise [B, T, 1, D] is taken for an intermediate.
    """

    def leaf(node: Node) -> Leaf | None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() not in (3, 4):
            return None
        shape = sizes.shape(node)
        width = shape[3] if len(shape) == 4 else 0
        for head_first in orders:
            count, length = (shape[1], shape[2]) if head_first else (shape[2], shape[1])
            if (shape[0], length) != (batch, tokens) or width == 1:
                continue
            shared = width and count and heads % count == 0 and (count > 1 or single)
            if count == heads or shared:
                return Leaf(node, count, width, head_first)
        return None

    return leaf


def walk(roots: Sequence[Node], stop: Stop) -> tuple[list[Node], dict[Node, Leaf | None]]:
    """All nodes between `roots` and the frontier, inputs before users, and the frontier: leaves, and others (None).

    The order depends on the structure alone, so that equal subgraphs are listed alike.
    """
    inside: dict[Node, bool] = {}  # whether its inputs are listed
    order: list[Node] = []
    frontier: dict[Node, Leaf | None] = {}
    stack = list(reversed(roots))
    while stack:
        node = stack[-1]
        if node in frontier or inside.get(node):
            stack.pop()
        elif node in inside:
            stack.pop()
            inside[node] = True
            order.append(node)
        elif (leaf := stop(node)) is not None or not followed(node):
            stack.pop()
            if isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
                frontier[node] = leaf
        else:
            inside[node] = False
            if len(inside) > MOST_NODES:
                hint = f"divide the sequence into fewer, longer chunks, or {advice.LOOP}"
                raise NearMiss(f"it is made of more than {MOST_NODES} nodes", hint)
            stack += [n for n in reversed(node.all_input_nodes) if n not in inside]
    return order, frontier


# where the walk stops, and what else may be a leaf where it ends: whether heads come first
_ORDERS: tuple[tuple[tuple[bool, ...], tuple[bool, ...]], ...] = (
    ((False,), ()),
    ((False,), (False, True)),
    ((False, True), ()),
    ((True,), ()),
)


def regions(
    assembly: Assembly, tokens: int, roots: Sequence[Node], sizes: Sizes
) -> Iterator[tuple[int, Region | NearMiss]]:
    """What may be the region above `roots`, checked to be analytic and in float32.

    Tokens come before heads as a rule. Where sizes coincide the shape of a tensor does not tell them apart, nor
    operands from an initial state; then there are several regions, and the proof decides.

    Yields:
        The number of token leaves, and the region or what is wrong with it.
    """
    batch, heads = assembly.sizes["b"], assembly.sizes["h"]
    tried: set[frozenset[Leaf]] = set()
    for stops, ends in _ORDERS if tokens == heads else _ORDERS[:-1]:
        nodes, frontier = walk(roots, token_leaves(batch, tokens, heads, sizes, stops, False))
        at_end = token_leaves(batch, tokens, heads, sizes, ends, True)
        leaves = [leaf for leaf in (at or at_end(node) for node, at in frontier.items()) if leaf is not None]
        if frozenset(leaves) in tried:
            continue
        tried.add(frozenset(leaves))
        known = {leaf.node for leaf in leaves}
        try:
            others = [node for node in frontier if node not in known]
            yield len(leaves), _checked(leaves, others, nodes, assembly, sizes)
        except NearMiss as miss:
            yield len(leaves), miss


def extended(known: Region, assembly: Assembly, roots: Sequence[Node], sizes: Sizes) -> Region:
    """The region above more roots, with the same leaves and state.

    Raises:
        NearMiss: the roots read something else.
    """
    leaves = {leaf.node: leaf for leaf in known.leaves}
    nodes, frontier = walk(roots, leaves.get)
    others = [node for node in frontier if node not in leaves]
    found = _checked([leaf for leaf in frontier.values() if leaf is not None], others, nodes, assembly, sizes)
    if known.state is not None and found.state is not known.state:
        raise NearMiss("its final state starts from another state than its results")
    return found


def _checked(leaves: list[Leaf], foreign: list[Node], nodes: list[Node], assembly: Assembly, sizes: Sizes) -> Region:
    depends = {leaf.node: 1 << i for i, leaf in enumerate(leaves)} | dict.fromkeys(foreign, _STATE)
    for node in nodes:
        mask = 0
        if node.target not in semantics.FILLS:
            for source in node.all_input_nodes:
                mask |= depends.get(source, 0)
        depends[node] = mask
    state = _initial_state(nodes, depends, foreign, assembly, sizes)
    kept = nodes
    if state is not None:
        depends[state] = _STATE
        reached = _below(nodes, state)
        kept = [n for n in nodes if depends[n] != _STATE or n in reached]
    roundings = check_arithmetic([n for n in kept if n is not state], depends, assembly.pieces)
    return Region(leaves, state, [n for n in kept if n is not state], depends, roundings)


def _initial_state(
    nodes: Sequence[Node], depends: dict[Node, int], foreign: Sequence[Node], assembly: Assembly, sizes: Sizes
) -> Node | None:
    """The one tensor [B, H, K, V] through which everything that is no row per token is read."""
    found: dict[Node, None] = {}
    for node in nodes:
        if depends[node] not in (0, _STATE):
            for source in node.all_input_nodes:
                if depends.get(source) == _STATE:
                    found[_state_itself(source, assembly, sizes)] = None
    read = [node for node in foreign if any(user in depends for user in node.users)]
    if not found and not read:
        return None
    for node in found or [node for node in read if not _state_like(node, assembly, sizes)]:
        if not _state_like(node, assembly, sizes):
            raise NearMiss(f"it also reads {node.name}, {list(sizes.shape(node))}, which has no row per token and head")
    if len(found) != 1:
        found = found or dict.fromkeys(read)
        names = ", ".join(node.name for node in found)
        raise NearMiss(f"it starts from several states: {names}")
    return next(iter(found))


def _state_like(node: Node, assembly: Assembly, sizes: Sizes) -> bool:
    shape = sizes.shape(node)
    return len(shape) == 4 and shape[:2] == (assembly.sizes["b"], assembly.sizes["h"])


def _state_itself(node: Node, assembly: Assembly, sizes: Sizes) -> Node:
    """The tensor of which `node` is a view, copy or widening cast, as far back as it has the axes of a state."""
    best = node
    while node.op == "call_function" and node.target in _MOVERS and isinstance(node.args[0], Node):
        source = node.args[0]
        widens = node.target not in semantics.CASTS or _itemsize(source) <= _itemsize(node)
        same = node.target in semantics.CASTS | semantics.COPIES | semantics.RESHAPES
        whole = node.target is aten.expand.default and sizes.shape(source) == sizes.shape(node)
        if not widens or not (same or whole):
            break
        node = source
        if _state_like(node, assembly, sizes):
            best = node
    return best


def _below(nodes: Sequence[Node], state: Node) -> set[Node]:
    """Nodes that are computed from `state`."""
    found = {state}
    for node in nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found - {state}


def check_arithmetic(nodes: Sequence[Node], depends: Mapping[Node, int], results: Collection[Node]) -> list[Node]:
    """Only analytic arithmetic in float32; the roundings on the way that Inductor drops, those of `results` excepted.

    Raises:
        NearMiss: anything else.
    """
    exact = set(depends) - set(nodes)  # the values of a leaf, moved
    roundings: list[Node] = []
    for node in nodes:
        if not depends[node] or not isinstance(node.meta["val"], torch.Tensor):
            continue
        dtype = node.meta["val"].dtype
        _check_target(node, depends)
        if not dtype.is_floating_point or dtype.itemsize not in (2, 4):
            reason = f"{node.name} is computed in {dtype_name(dtype)}; the kernel computes in float32"
            raise NearMiss(reason, IN_FLOAT32)
        sources = [n for n in node.all_input_nodes if depends.get(n)]
        if _moves(node) and sources[0] in exact and _itemsize(sources[0]) <= dtype.itemsize:
            exact.add(node)
        elif node.target in _CONTRACTIONS:
            narrow = [n for n in (*sources, node) if _itemsize(n) < 4 and (n is node or n not in exact)]
            if narrow:
                raise NearMiss(
                    f"{narrow[0].name} is rounded to {dtype_name(narrow[0].meta['val'].dtype)} around a sum or matrix "
                    "product; the kernel keeps it in float32",
                    IN_FLOAT32,
                )
        elif dtype.itemsize < 4 and node not in results and node.target not in _MOVERS - semantics.CASTS:
            roundings.append(node)
    return roundings


def _moves(node: Node) -> bool:
    """Does `node` show values of its first argument and nothing else but constants?"""
    return node.target in _MOVERS or node.target is operator.getitem


def _check_target(node: Node, depends: Mapping[Node, int]) -> None:
    if node.target in semantics.SELECTIONS:
        mask = node.args[semantics.SELECTIONS[node.target][0]]
        if isinstance(mask, Node) and depends.get(mask):
            raise NearMiss(f"{node.name} selects by its data")
    elif node.target in semantics.POINTWISE and node.target not in ANALYTIC:
        raise NearMiss(f"{node.name} ({node.target}) is no part of a delta rule")
    elif node.target in semantics.FOLDS and node.target not in _SUMS:
        raise NearMiss(f"{node.name} ({node.target}) is no part of a delta rule")


_SUMS = (aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)


def leaf_layout(leaf: Leaf, batch: int, tokens: int, groups: int, heads: int, single: bool) -> Layout:
    """The axes of a leaf by name; `single` where all tokens are one chunk and time is no axis of its own."""
    per_group = heads // groups
    if leaf.heads == heads:
        head: tuple[Factor, ...] = (Factor("g", groups), Factor("r", per_group))
    else:
        head = (Factor("g", leaf.heads),)
    time = (Factor(PLAIN if single else TIME, tokens),)
    dims = [(Factor("b", batch),), head, time] if leaf.head_first else [(Factor("b", batch),), time, head]
    return (*dims, (Factor(PLAIN, leaf.width),)) if leaf.width else tuple(dims)


def fingerprint(roots: Sequence[Node], found: Region, sizes: Sizes, *more: Any) -> str:
    """A digest that two regions share only if they are the same graph over leaves of the same shape."""
    number: dict[Node, int] = {}
    ends = [*(leaf.node for leaf in found.leaves), *([found.state] if found.state is not None else [])]
    digest = hashlib.sha256()
    for node in (*ends, *found.nodes):
        number[node] = len(number)

    spelled = speller(number, [sizes])
    leaves = [(leaf.heads, leaf.width, leaf.head_first) for leaf in found.leaves]
    digest.update(repr((leaves, found.state is not None, more)).encode())
    for node in number:
        value = node.meta["val"]
        shape = f"{value.dtype}{sizes.shape(node)}" if isinstance(value, torch.Tensor) else "tuple"
        digest.update(f"{shape};".encode())
        if node in found.depends and node not in ends:
            named = {name: spelled(argument) for name, argument in node.kwargs.items()}
            digest.update(f"{node.target}{spelled(node.args)}{named};".encode())
    digest.update(spelled(list(roots)).encode())
    return digest.hexdigest()


def _itemsize(node: Node) -> int:
    value = node.meta.get("val")
    return int(value.dtype.itemsize) if isinstance(value, torch.Tensor) else 8
