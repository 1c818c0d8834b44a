"""What becomes of a head gate's product: views, casts, constant factors, and at most one scale per row and head.

Candidates for the end of the chain are the pointwise nodes that the product alone flows into. The furthest is taken
whose values at random places are s * product * q, with one number s for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from fusion_passes import advice, cone, premises
from fusion_passes import aten as semantics
from fusion_passes.evaluate import constant, hashed
from fusion_passes.fusion import Because, Context, NearMiss
from fusion_passes.patterns._head_gate_product import FLOATS, is_move, side_of, without_views
from fusion_passes.patterns._likeness import likeness
from fusion_passes.patterns._proofs import Proofs
from fusion_passes.probe import agree, sample, solve_scale
from fusion_passes.sizes import Sizes, Unsupported

aten = torch.ops.aten

COUNT = 192
SEEDS = (1, 2)
LONGEST = 24
SPECIAL = (0.0, 1e3, -1e3, 1e6, -1e6, 1e30, -1e30, math.inf, -math.inf, math.nan)

proofs: Proofs[tuple[float | None, ...]] = Proofs()


@dataclasses.dataclass(frozen=True)
class Scaling:
    """root = scale * product * q.

    Attributes:
        root: the last node of the chain.
        chain: the nodes from the product (left out) to the root.
        interior: all nodes that compute the root from product and q.
        q: the tensor of the scales, or None.
        scale: the constant factor.
        roundings: nodes whose rounding to 16 bits the fused op leaves out.
    """

    root: Node
    chain: tuple[Node, ...]
    interior: frozenset[Node]
    q: Node | None
    scale: float
    roundings: tuple[Node, ...]


def find(product: Node, context: Context) -> Scaling:
    """The furthest end of the chain.

    Raises:
        NearMiss: nothing that the product flows into is a multiple of it; the message says what it is instead.
    """
    chain = list(_chain(product, context.sizes[0]))
    failure: Exception | None = None
    for end in reversed(range(len(chain))):
        root = chain[end]
        if is_move(root) or root.meta["val"].dtype not in FLOATS:
            continue
        try:
            return _prove(product, tuple(chain[: end + 1]), context)
        except (NearMiss, Unsupported) as miss:
            failure = miss
    if isinstance(failure, NearMiss):
        raise failure
    fate = _fate(product)
    raise NearMiss(f"its product ({product.name}) is not scaled: {fate}", fate.hint)


def _chain(product: Node, sizes: Sizes) -> Iterator[Node]:
    """The pointwise nodes, casts and views that the product flows into, as long as each has a single user."""
    node, count = product, sizes.numel(product)
    for _ in range(LONGEST):
        users = [user for user in node.users if user.op != "call_function" or user.users]
        if len(users) != 1:
            return
        (node,) = users
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or sizes.numel(node) != count or not _keeps_elements(node):
            return
        yield node


def _keeps_elements(node: Node) -> bool:
    return node.target in semantics.POINTWISE or carries_product(node)


def carries_product(node: Node) -> bool:
    """Is `node` a view, a cast or a copy?"""
    return is_move(node) or node.target in semantics.CASTS or node.target is aten.clone.default


def _prove(product: Node, chain: tuple[Node, ...], context: Context) -> Scaling:
    root = chain[-1]
    q = _scale_tensor(product, chain)
    leaves = {product} if q is None else {product, q}
    whole = cone.backward(root, stop=leaves)
    others = [leaf.name for leaf in whole.leaves if leaf not in leaves]
    if others:
        raise NearMiss(f"its product ({product.name}) meets {', '.join(others)}, which is no scale of it")
    scales = _scales(root, product, q, context.sizes)
    premises.check_linear({product}, whole.interior)
    premises.check_constants(premises.dependents({product}, whole.interior), leaves, context.sizes)
    if len(set(scales)) > 1:
        raise NearMiss("its constant factor depends on a size that is symbolic", advice.STATIC)
    narrow = [n for n in whole.interior if n is not root and n.meta["val"].dtype.itemsize < 4 and _rounds(n)]
    return Scaling(root, chain, frozenset(whole.interior), q, scales[0], tuple(narrow))


def _rounds(node: Node) -> bool:
    """Does `node` round to a narrow float type, rather than pass on a value that is one already?"""
    if node.target in semantics.CASTS:
        source = node.args[0]
        return isinstance(source, Node) and source.meta["val"].dtype != node.meta["val"].dtype
    return node.meta["val"].dtype.is_floating_point and cone.computes(node)


def _scale_tensor(product: Node, chain: tuple[Node, ...]) -> Node | None:
    """The one tensor that a node of the chain multiplies in, without the upcasts and views on the way.

    Raises:
        NearMiss: there are several, or it is computed for the product alone.
    """
    found: list[Node] = []
    before = product
    for node in chain:
        found += [n for n in node.all_input_nodes if n is not before and _is_tensor(n)]
        before = node
    tensors = [n for n in dict.fromkeys(found) if not _is_constant(n)]
    if not tensors:
        return None
    if len(tensors) > 1:
        raise NearMiss(f"its product ({product.name}) meets several tensors: {', '.join(n.name for n in tensors)}")
    leaf = side_of(tensors[0]).leaf
    owner = without_views(leaf)
    if cone.computes(owner) and len(owner.users) == 1:
        raise NearMiss(
            f"its product ({product.name}) meets {owner.name}, which Inductor computes where it is used; as a scale of "
            "the fused op it would go through memory"
        )
    return leaf


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_constant(node: Node) -> bool:
    return constant(node, Sizes())


def _scales(root: Node, product: Node, q: Node | None, assignments: Sequence[Sizes]) -> tuple[float, ...]:
    """The number s in root = s * product * q, under each assignment.

    Raises:
        NearMiss: the root is something else.
        Unsupported: it cannot be evaluated.
    """
    leaves = [product] if q is None else [product, q]
    alike = likeness(root, leaves, assignments)
    found = alike.proved(proofs, lambda: tuple(_scale(root, product, q, sizes) for sizes in assignments))
    known = tuple(scale for scale in found if scale is not None)
    if len(known) < len(found):
        raise NearMiss(f"what becomes of its product ({root.name}, {_what(root)}) is not a multiple of it")
    return known


def _scale(root: Node, product: Node, q: Node | None, sizes: Sizes) -> float | None:
    """The number s in root = s * product * q, None where it is something else."""
    scale: float | None = None
    for seed in SEEDS:
        draws = {product: hashed(seed, -3.0, 3.0, SPECIAL)}
        draws |= {q: hashed(10 + seed, -3.0, 3.0, (0.0, 1e3, -1e3))} if q is not None else {}
        run = sample(root, draws, sizes, COUNT, seed)
        reference = run.leaves[product] if q is None else run.leaves[product] * run.leaves[q]
        scale = scale if scale is not None else solve_scale(run.values, reference)
        if scale is None or not agree(run.values, reference * scale, reference.abs().nan_to_num(0, 0, 0) * abs(scale)):
            return None
    return scale


def _fate(node: Node) -> Because:
    """Where a product goes, in words."""
    while True:
        if len(node.users) > 1 and any(user.op == "output" for user in node.users):
            return Because("it is returned by the graph or saved for the backward pass", advice.KEPT)
        if len(node.users) != 1:
            return Because(f"{len(node.users)} nodes use it")
        node = next(iter(node.users))
        if not is_move(node):
            return Because(f"it goes to {node.name} ({_what(node)})")


def _what(node: Node) -> str:
    if node.op == "output":
        return "a result of the graph"
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]
