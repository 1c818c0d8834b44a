"""The scores of a sparse-attention indexer, in one launch instead of products per head.

Found: any subgraph that computes, for queries s and keys t of any number of sequences,

    I[s, t] = scale * sum over h of w[s, h] * relu(q[s, h, :] . k[t, :])       scale > 0, w of either sign

whatever the spelling: matmul, einsum or bmm, the heads summed up by `sum`, by a product with the weights as a row, or
by a loop; with float8 operands and the scales of their rows; and with a mask: bits, a summand, or a comparison of
positions, which the kernel then needs no memory for. The structure says which products there are, where their operands
are read says what the axes mean, and values at random places have to agree with the formula. All sizes but heads and
channels may be symbolic.

Near misses:

- another activation than relu, or no weights
- keys that differ from head to head, weights that depend on the key, a mask that depends on the head
- a single head, heads that are not all read, or products of a part of the channels

Refused:

- a negative scale that cannot be left outside of the fused op
- scores per head that are needed elsewhere
- more than 128 heads, more than 256 channels or no multiple of 8
- what a GPU cannot hold in shared memory, such as 128 heads of 192 channels in float32
- float8 on GPUs before sm_89 and on AMD GPUs, which have no such products

Gains: one launch and no [S, H, T] tensor. Blocks that the mask hides cost no product, and a causal mask no memory.

The selection behind the scores takes torch 390 us on an H200 for 2,048 of 8,192 keys of 2,048 queries, about as long as
the scores take. Where it is only asked which keys are selected, `topk_mask` takes its place; where all are, `full_topk`
leaves out both.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import advice, arch, cone, rewrite
from fusion_passes.fusion import Because, Context, Fusion, NearMiss, Reason, Refusal, Site, dtype_name
from fusion_passes.layout import Piece
from fusion_passes.ops import index_score as op
from fusion_passes.ops._index_score_checks import FLOATS, LEAST_WIDTH, MOST_HEADS, MOST_WIDTH, OPERANDS, VECTOR
from fusion_passes.patterns import _index_mask, _index_proof
from fusion_passes.patterns._index_mask import Mask
from fusion_passes.patterns._index_operands import Reader, ends
from fusion_passes.patterns._index_proof import Sum
from fusion_passes.patterns._index_roles import Roles, assign
from fusion_passes.patterns._index_terms import MATMULS, SUMS, Structure, candidates
from fusion_passes.patterns._likeness import likeness
from fusion_passes.patterns._mla_views import Lengths, relabel, window
from fusion_passes.patterns._proofs import Proofs
from fusion_passes.sizes import Sizes, Unsupported
from fusion_passes.views import ravel

aten, prims = torch.ops.aten, torch.ops.prims

SELECTIONS = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.kthvalue.default)
ACTIVATIONS = (
    aten.relu.default, aten.clamp_min.default, aten.clamp.default, aten.maximum.default, aten.hardtanh.default,
)  # fmt: skip
# What an activation by `where` or by a product asks of the products.
COMPARISONS = (aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar)
# How far `wants` looks.
STEPS = 24


@dataclasses.dataclass(frozen=True)
class Scores:
    """One proven index score under one assignment of sizes."""

    structure: Structure
    sum: Sum
    mask: Mask
    roles: Roles


proofs: Proofs[list[Scores]] = Proofs()


def wants(anchor: Node) -> bool:
    """Selections from floats, and activations of matrix products that no selection speaks for."""
    source = anchor.args[0] if anchor.args else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return False
    if not source.meta["val"].dtype.is_floating_point or source.meta["val"].dim() < 2:
        return False
    if anchor.target in SELECTIONS:
        return True
    for _ in range(STEPS):
        if source.target in MATMULS:
            return _bottom(anchor) is not None
        if not cone.is_transparent(source):
            return False
        sources = [n for n in source.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if not sources:
            return False
        source = max(sources, key=lambda n: len(n.meta["val"].shape))
    return False


def _bottom(activation: Node) -> Node | None:
    """The last node that is made of an activation, a sum over heads and pointwise work, if no selection follows."""
    node, summed = activation, False
    for _ in range(40 * STEPS):
        users = [user for user in node.users if user.users or user.op == "output"]
        if any(user.target in SELECTIONS for user in users):
            return None
        if not summed:  # what is saved for the backward pass is a reason to refuse the site, not to overlook it
            users = [user for user in users if not _is_result(user)] or users
        if len(users) != 1 or users[0].op == "output":
            break
        (user,) = users
        reduces = user.target in SUMS or user.target in MATMULS
        if not (cone.is_transparent(user) or (reduces and not summed)):
            break
        summed |= reduces
        node = user
    return node if summed or node.target is aten.add.Tensor else None


def _is_result(node: Node) -> bool:
    """Is `node` the output of the graph, or needed by nothing else?"""
    return node.op == "output" or all(user.op == "output" for user in node.users)


def match(anchor: Node, context: Context) -> Site | None:
    """Prove that what is selected from, or what becomes of the activation, is an index score."""
    if anchor.target in SELECTIONS:
        bottom = anchor.args[0]
    else:
        bottom = _bottom(anchor)
    if not isinstance(bottom, Node):
        return None
    failure: Exception | None = None
    for structure in candidates(bottom, context.sizes[0]):
        if anchor.target not in SELECTIONS and anchor not in structure.nodes:
            continue
        try:
            return _site(anchor, _known(structure, bottom, context), context)
        except (NearMiss, Unsupported) as miss:
            failure = failure or miss
    if failure is not None:
        raise failure
    return None


def _known(structure: Structure, bottom: Node, context: Context) -> list[Scores]:
    """What is proved of the scores, or was of those of another layer that are made alike."""
    alike = likeness(bottom, ends(structure, bottom), context.sizes)
    alike = dataclasses.replace(alike, key=f"{alike.key} {alike.nodes.index(structure.base)}")
    return alike.proved(proofs, lambda: _proven(structure, bottom, context))


def _proven(structure: Structure, bottom: Node, context: Context) -> list[Scores]:
    """The scores under every admissible assignment of sizes, which differ in lengths of axes alone."""
    first = _prove(structure, bottom, context.sizes[0])
    found = [first]
    for sizes in context.sizes[1:]:
        again = next(iter(s for s in candidates(bottom, sizes) if s.base is structure.base), None)
        other = _prove(again, bottom, sizes) if again is not None else None
        if other is None or (other.sum, other.mask) != (first.sum, first.mask) or _form(other) != _form(first):
            raise NearMiss("it is an index score for some sizes only", advice.STATIC)
        found.append(other)
    return found


def _form(scores: Scores) -> Any:
    """What must not depend on sizes: the tensors, and which axes of the scores have which role."""
    roles = scores.roles
    groups = (roles.batch, roles.queries, roles.keys, roles.heads, roles.channels)
    leaves = (roles.query, roles.key)
    return leaves, [[(p.axis, p.static, p.size if p.static else 0) for p in group] for group in groups]


def _prove(structure: Structure, bottom: Node, sizes: Sizes) -> Scores:
    total, base_roles = _index_proof.prove(structure, sizes)
    failure: Exception | None = None
    for mask in _index_mask.finishes(structure.base, bottom, sizes):
        if mask.k_after is not None and (total.k_after or total.k_scale or base_roles.key.scale) is not None:
            continue
        try:
            return Scores(structure, total, mask, _roles(structure, total, mask, sizes))
        except (NearMiss, Unsupported, Refusal) as miss:
            failure = miss
    assert failure is not None
    raise failure


def _roles(structure: Structure, total: Sum, mask: Mask, sizes: Sizes) -> Roles:
    """The roles of the axes of the node that is replaced."""
    reader = Reader(structure, mask.root, sizes)
    inside = [*total.weights, *(s for s in (total.q_scale, total.k_scale, total.k_after) if s is not None)]
    maps = {leaf: reader.map(reader.weight(leaf), leaf) for leaf in inside}
    maps |= {leaf: reader.map(reader.beside(leaf), leaf) for leaf in (mask.leaf, mask.k_after) if leaf is not None}
    roles = assign(reader, maps)
    if mask.k_after is not None and not roles.used(mask.k_after) <= {*roles.batch, *roles.keys}:
        raise NearMiss("a factor of the scores depends on the query")
    if mask.leaf is not None and not roles.used(mask.leaf) <= {*roles.batch, *roles.queries, *roles.keys}:
        raise NearMiss("the mask depends on the head")
    return roles


def _site(anchor: Node, proven: list[Scores], context: Context) -> Site:
    scores = proven[0]
    total, mask, roles = scores.sum, scores.mask, scores.roles
    sizes = context.sizes[0]
    named = {"q": roles.query.leaf, "k": roles.key.leaf, "mask": mask.leaf}
    named |= {"q_scale": total.q_scale or roles.query.scale}
    named |= {"k_scale": total.k_scale or roles.key.scale or total.k_after or mask.k_after}
    named |= {f"w{i}" if i else "w": weight for i, weight in enumerate(total.weights)}
    offset = _offset(proven, context)
    if offset is not None:
        del named["mask"]
    heads, width = (math.prod(p.size for p in group) for group in (roles.heads, roles.channels))
    scale = total.scale * mask.scale
    masked = "causal" if offset is not None else {"none": "no", "add": "added"}.get(mask.kind, "boolean")
    dtype = roles.query.leaf.meta["val"].dtype
    products = sum(map(sizes.numel, scores.structure.products))
    return Site(
        anchor=anchor,
        replaced=mask.root,
        leaves={name: leaf for name, leaf in named.items() if leaf is not None},
        interior=set(scores.structure.nodes | mask.nodes) | {mask.root},
        params={"scores": scores, "offset": offset, "sizes": sizes},
        roundings=[*total.roundings, *mask.roundings],
        summary=f"{heads} heads of {width} channels, {dtype_name(dtype)}, {masked} mask, times {scale:.6g}",
        saved_bytes=2 * products * scores.structure.products[0].meta["val"].dtype.itemsize,
    )


def _offset(proven: list[Scores], context: Context) -> int | str | None:
    """The causal offset of the mask: a number, "T - S", or None where the mask has to be read."""
    mask = proven[0].mask
    if mask.leaf is None:
        return None
    found = []
    for sizes, scores in zip(context.sizes, proven, strict=True):
        roles = scores.roles
        if len(roles.queries) > 1 or len(roles.keys) > 1 or roles.used(mask.leaf) & {*roles.batch}:
            return None
        queries, keys = (math.prod(p.size for p in group) for group in (roles.queries, roles.keys))
        axis_map = roles.maps[mask.leaf]

        def read(s: torch.Tensor, t: torch.Tensor, roles: Roles = roles, axis_map: Any = axis_map) -> torch.Tensor:
            coords = [torch.zeros_like(s) for _ in axis_map.root_shape]
            for group, places in ((roles.queries, s), (roles.keys, t)):
                for piece in group:
                    coords[piece.axis] = coords[piece.axis] + places * piece.stride
            return ravel(axis_map.read(coords), axis_map.leaf_shape)

        offset = _index_mask.causal_offset(mask.leaf, mask.kind, read, queries, keys, sizes)
        if offset is None:
            return None
        found.append((offset, keys - queries))
    if len({offset for offset, _ in found}) == 1:
        return found[0][0]
    return "T - S" if all(offset == difference for offset, difference in found) else None


def guard(site: Site, context: Context) -> Reason:
    """The kernel is compiled for fixed heads and channels and has limits on both."""
    roles: Roles = site.params["scores"].roles
    for what, group in (("heads", roles.heads), ("channels", roles.channels)):
        if len({p.size for p in group if not p.static}):
            return advice.symbolic(what)
    heads, width = (math.prod(p.size for p in group) for group in (roles.heads, roles.channels))
    if heads > MOST_HEADS:
        return f"it has {heads} heads; the kernel has products of up to {MOST_HEADS}"
    if width % VECTOR or not LEAST_WIDTH <= width <= MOST_WIDTH:
        fit = f"multiples of {VECTOR} from {LEAST_WIDTH} to {MOST_WIDTH}"
        hint = advice.padded("q and k", width, range(LEAST_WIDTH, MOST_WIDTH + 1, VECTOR))
        return Because(f"its heads have {width} channels; the kernel reads {fit}", hint)
    q, k = (side.leaf.meta["val"].dtype for side in (roles.query, roles.key))
    if q != k or q not in OPERANDS:
        return f"its products are of {dtype_name(q)} and {dtype_name(k)}; the kernel takes two of the same float"
    for name, leaf in site.leaves.items():
        if name not in ("q", "k", "mask") and leaf.meta["val"].dtype not in FLOATS:
            allowed = ", ".join(map(dtype_name, FLOATS))
            reason = f"{name} is {dtype_name(leaf.meta['val'].dtype)}; the fused op reads {allowed}"
            return Because(reason, advice.stored(name, FLOATS))
    if site.replaced.meta["val"].dtype not in FLOATS:
        reason = f"its scores are {dtype_name(site.replaced.meta['val'].dtype)}"
        return Because(reason, f"compute them in {advice.listed(FLOATS)}")
    device = site.replaced.meta["val"].device
    if device.type != "cuda" and context.settings.reference_on_cpu:
        return None
    on = arch.of_device(device) if device.type == "cuda" and torch.cuda.is_available() else None
    return op.unsupported(on or arch.by_name(context.settings.arch), q, heads, width)


# --- rewrite ---------------------------------------------------------------------------------------------------------


def replace(site: Site, graph: Graph) -> Node:
    """`torch.ops.fusion_passes.index_score` on views of the leaves, its result viewed as the graph had it."""
    scores: Scores = site.params["scores"]
    offset, sizes = site.params["offset"], site.params["sizes"]
    total, mask, roles = scores.sum, scores.mask, scores.roles
    # Queries that are not one axis of memory become batches that share their keys.
    batch, queries = [*roles.batch, *roles.queries[:-1]], [*roles.queries[-1:]]
    groups = {"b": batch, "s": queries, "t": [*roles.keys], "h": [*roles.heads], "d": [*roles.channels]}
    shape = mask.root.meta["val"].shape
    known: dict[Hashable, Any] = {p: p.size if p.static or p.axis >= len(shape) else shape[p.axis]
             for group in groups.values() for p in group}  # fmt: skip
    lengths = Lengths(known, list(site.leaves.values()))

    def view(name: str, axes: str) -> Node | None:
        leaf = site.leaves.get(name)
        return None if leaf is None else _operand(graph, leaf, roles, [groups[axis] for axis in axes], lengths)

    q, k, w, mask_view = view("q", "bshd"), view("k", "btd"), view("w", "bsh"), view("mask", "bst")
    q_scale, k_scale = view("q_scale", "bsh"), view("k_scale", "bt")
    assert q is not None and k is not None and w is not None
    for index in range(1, len(total.weights)):
        another = view(f"w{index}", "bsh")
        w = rewrite.call(graph, aten.mul.Tensor, *(_widened(graph, t) for t in (w, another)))
    extents = {"b": (q, 0), "s": (q, 1), "t": (k, 1), "h": (q, 2)}
    k = _expanded(graph, k, "bt", extents)
    w, q_scale = (_expanded(graph, t, "bsh", extents) for t in (w, q_scale))
    k_scale, mask_view = _expanded(graph, k_scale, "bt", extents), _expanded(graph, mask_view, "bst", extents)
    for name, node in (("q", q), ("k", k)):
        step = node.meta["val"].stride()[-1]
        if not statically_known_true(step == 1):
            reason = f"the channels of {name} ({site.leaves[name].name}) lie {step} elements apart in memory"
            raise Refusal(reason, advice.adjacent(name, "channels"))
    kind = mask.kind if offset is None else "causal"
    causal = _difference(graph, k, q) if isinstance(offset, str) else offset or 0
    after = total.k_scale is None and roles.key.scale is None
    layout = _layout(site.replaced, groups, sizes)
    out = rewrite.call(
        graph, op.OP, q, k, w, q_scale, k_scale, mask_view, kind, causal, total.scale * mask.scale, mask.fill,
        total.keep_nan, after, _precision(), site.replaced.meta["val"].dtype, layout,
    )
    have = [groups[axis] for axis in layout]
    return relabel(graph, out, have, [roles.pieces[axis] for axis in range(len(shape))], lengths)


def _operand(graph: Graph, leaf: Node, roles: Roles, groups: list[list[Piece]], lengths: Lengths) -> Node:
    """A view of a leaf whose axes are the groups, of size 1 where it does not depend on one."""
    read = roles.used(leaf)
    for group in groups:
        if read.intersection(group) not in (set(), set(group)):
            raise Refusal(f"{leaf.name} depends on a part of an axis of the scores")
    mine = [[p for p in group if p in read] for group in groups]
    return window(graph, leaf, roles.maps[leaf], roles.pieces, mine, lengths)


def _expanded(graph: Graph, node: Node | None, axes: str, extents: dict[str, tuple[Node, int]]) -> Any:
    """`node` with its axes of size 1 repeated to the lengths of q and k; -1 leaves an axis as it is."""
    if node is None:
        return None
    shape = node.meta["val"].shape
    repeated = [i < len(axes) and statically_known_true(n == 1) for i, n in enumerate(shape)]
    wanted = [rewrite.size(graph, *extents[axes[i]]) if again else -1 for i, again in enumerate(repeated)]
    return node if all(n in (1, -1) for n in wanted) else rewrite.call(graph, aten.expand.default, node, wanted)


def _widened(graph: Graph, node: Any) -> Node:
    return rewrite.call(graph, prims.convert_element_type.default, node, torch.float32)


def _difference(graph: Graph, k: Node, q: Node) -> int | Node:
    keys, queries = rewrite.size(graph, k, 1), rewrite.size(graph, q, 1)
    return rewrite.call(graph, operator.sub, keys, queries)


def _layout(root: Node, groups: dict[str, list[Piece]], sizes: Sizes) -> str:
    """Batch, queries and keys in the order of the memory of `root`, outermost first."""
    strides = sizes.strides(root)

    def step(axis: str) -> float:
        return strides[groups[axis][-1].axis] * groups[axis][-1].stride if groups[axis] else math.inf

    return "".join(sorted("bst", key=step, reverse=True))


def _precision() -> str:
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


FUSION = Fusion(
    name="index_score",
    doc="scores of a sparse-attention indexer: weighted sum over heads of relu(q . k), masked, in one launch",
    anchors=(*SELECTIONS, *ACTIVATIONS, *COMPARISONS),
    match=match,
    replace=replace,
    guard=guard,
    wants=wants,
    dtypes=(*OPERANDS, torch.bool),
    tolerance=2e-2,
)
