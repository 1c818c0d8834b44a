"""The whole (gated) delta rule as models spell it: chunks, the solve within each, and the scan over them.

Found: a result [B, T, H, V] that is put together from chunks of 16 to 128 tokens, in a loop that was unrolled when the
model was traced, where every chunk reads rows of q, k, v, a log decay and beta, and hands one state on to the next. How
a chunk is computed (triangular solve, forward substitution, inverse, loops over columns) does not matter: a chunk is
evaluated as it stands and compared with the recurrence, token by token. See `_delta_rule_proof` for what is proved and
how. The gate, the l2 norms of q and k, the sigmoid of beta, repeated key heads, an initial and a final state and
strided operands are part of the op.

Near misses:

- a symbolic number of tokens: the loop over chunks is not in the graph (`transformers.bind` serves Hugging Face models
  there, `delta_rule_intra` other ones)
- a step that differs from the others, mixes heads, clamps a value, or reads more than one state of an earlier chunk
- sums or matrix products that are rounded to bfloat16, where the kernel keeps float32
- operands beside q, k, v, one gate and beta, or that have no row per token and head

Refused:

- K or V other than 64, 96, 128, 192 and 256
- intermediates that are needed elsewhere, or saved for the backward pass

Gains: two or three launches in place of hundreds, no tensor of chunk products in memory, and a graph without the
unrolled loop, which compiles in less time.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from fusion_passes import advice, rewrite
from fusion_passes import aten as semantics
from fusion_passes.fusion import Because, Context, Fusion, NearMiss, Reason, Site
from fusion_passes.lowering import contiguous_strides
from fusion_passes.ops import chunk_delta_rule as op
from fusion_passes.patterns import _delta_rule_operands as operands
from fusion_passes.patterns._chunk_assembly import ANCHORS, Assembly, Output, assemblies, output
from fusion_passes.patterns._delta_rule_proof import Meaning, prove
from fusion_passes.patterns._delta_rule_region import Region, extended, regions
from fusion_passes.patterns._parallel_axes import followed
from fusion_passes.sizes import Sizes, Unsupported

aten, prims = torch.ops.aten, torch.ops.prims

DIMS = (64, 96, 128, 192, 256)
EXPONENTIALS = (aten.exp.default, aten.exp2.default, prims.exp.default)
PRODUCTS = (aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.sum.dim_IntList)
GLANCE = 200  # nodes that are looked at before an assembly of chunks is taken for a delta rule
MOST_CANDIDATES = 6
LEAST_LEAVES = 4  # rows per token and head that make a subgraph worth a word when it is no delta rule


def match(anchor: Node, context: Context) -> Site | None:
    """Prove that the chunks put together at `anchor` are those of a delta rule."""
    found = [_found(anchor, sizes) for sizes in context.sizes]
    if found[0] is None:
        return None
    sites = [one for one in found if one is not None]
    meanings = [(one[1].tokens, one[1].head_first, one[4]) for one in sites]
    if len(sites) < len(found) or any(meaning != meanings[0] for meaning in meanings):
        raise NearMiss("it is a delta rule for some sizes only", advice.STATIC)
    return _site(anchor, *sites[0], context.sizes[0])


def _found(anchor: Node, sizes: Sizes) -> tuple[Assembly, Output, Region, Node | None, Meaning] | None:
    options = assemblies(anchor, sizes)
    if not options or not _promising(options[0].pieces[-1]):
        return None
    for assembly in options:
        out = output(assembly, sizes)
        if out is not None:
            break
    else:
        raise NearMiss("its chunks are not put together to one row per token and head")
    if not isinstance(out.node.meta["val"].shape[2 if out.head_first else 1], int):
        reason = "the number of tokens is symbolic, while the loop over chunks is unrolled when it is traced"
        raise NearMiss(reason, f"compile for a fixed number of tokens, or {advice.LOOP}")
    failure: Exception | None = None
    for leaves, part in regions(assembly, out.tokens, assembly.pieces, sizes):
        try:
            return assembly, out, *_proved(assembly, out, part, sizes)
        except (NearMiss, Unsupported) as miss:
            failure = failure or (miss if leaves >= LEAST_LEAVES else None)
    if failure is None:
        return None
    raise failure


def _proved(
    assembly: Assembly, out: Output, part: Region | NearMiss, sizes: Sizes
) -> tuple[Region, Node | None, Meaning]:
    """The region with its final state, if it has one, and what it computes."""
    if isinstance(part, NearMiss):
        raise part
    candidates = _candidates(part, assembly, sizes)
    if candidates:
        part = extended(part, assembly, [*assembly.pieces, *candidates], sizes)
    meaning = prove(assembly, out.tokens, part, candidates, sizes)
    return part, candidates[meaning.final] if meaning.final is not None else None, meaning


def _promising(piece: Node) -> bool:
    """Are there an exponential and a product close to the result of a chunk?"""
    seen, queue, wanted = {piece}, [piece], [EXPONENTIALS, PRODUCTS]
    for node in itertools.islice(iter(queue), GLANCE):
        wanted = [targets for targets in wanted if node.target not in targets]
        if not wanted:
            return True
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return False


def _candidates(part: Region, assembly: Assembly, sizes: Sizes) -> list[Node]:
    """Tensors [B, H, K, V] that are computed from the region and leave it: one of them may be the final state."""
    size = assembly.sizes
    widths = {leaf.width for leaf in part.leaves if leaf.width}
    inside = set(part.nodes) | {leaf.node for leaf in part.leaves}
    if part.state is not None:
        inside.add(part.state)
    queue = [user for node in part.nodes if part.depends[node] for user in node.users if user not in inside]
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    for node in itertools.islice(iter(queue), 4 * GLANCE):
        if node in seen or not followed(node) or node.target in ANCHORS or node.target is aten.copy.default:
            continue
        seen.add(node)
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        shape = sizes.shape(node)
        moved = node.target in semantics.VIEWS | semantics.COPIES | semantics.CASTS
        if len(shape) == 4 and shape[:2] == (size["b"], size["h"]) and shape[2] in widths and shape[3] == size["v"]:
            if not moved:
                found[node] = None
        queue += list(node.users)
    return sorted(found, reverse=True)[:MOST_CANDIDATES]


def _site(
    anchor: Node, assembly: Assembly, out: Output, part: Region, final: Node | None, meaning: Meaning, sizes: Sizes
) -> Site:
    q, k, v, g, beta = (part.leaves[i] for i in meaning.roles)
    read = {
        name: operands.rows(leaf.node, leaf.head_first, sizes)
        for name, leaf in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta))
    }
    if read["v"].shape[2] != v.heads:
        read["v"] = operands.Rows(v.node, (*read["v"].shape[:2], v.heads, v.width), v.head_first)
    roundings = list(part.roundings)
    gate = None if g.head_first else operands.decay_gate(read["g"].node, sizes)
    strength = None if beta.head_first else operands.strength(read["beta"].node, sizes)
    leaves = {name: rows.node for name, rows in read.items()}
    if gate is not None:
        read["g"], leaves["g"], leaves["a_log"] = gate.rows, gate.rows.node, gate.gate.a_log
        leaves |= {"dt_bias": gate.gate.bias} if gate.gate.bias is not None else {}
        roundings += gate.gate.roundings
    if strength is not None:
        read["beta"], leaves["beta"] = strength.rows, strength.rows.node
        roundings += strength.roundings
    if part.state is not None:
        leaves["initial_state"] = part.state
    outputs = [out.node] if final is None else [out.node, final]
    size = assembly.sizes
    kind = "per channel" if g.width else "per head"
    return Site(
        anchor=anchor,
        replaced=out.node,
        also=tuple(outputs[1:]),
        leaves=leaves,
        interior=_interior(outputs, set(leaves.values())),
        params={"meaning": meaning, "rows": read, "gate": gate, "strength": strength, "output": out,
                "widths": (k.width, size["v"])},
        roundings=roundings,
        summary=f"delta rule of {out.tokens} tokens, {read['k'].shape[2]} key and {size['h']} value heads of "
        f"{k.width} x {size['v']}, decay {kind}, {len(assembly.pieces)} chunks of {size['c']} rolled up"
        + (", final state" if final is not None else ""),
    )  # fmt: skip


def _interior(outputs: Sequence[Node], leaves: set[Node]) -> set[Node]:
    """All nodes between leaves and outputs that are no constants."""
    seen: set[Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in seen and node not in leaves:
            seen.add(node)
            stack += [] if node.target in semantics.FILLS else node.all_input_nodes
    varying = set(leaves)
    for node in sorted(seen):
        if node.target not in semantics.FILLS and not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    return varying - leaves


def guard(site: Site, context: Context) -> Reason:
    """The kernels have a few head dims."""
    for name, tensors, width in zip(("K", "V"), ("q and k", "v"), site.params["widths"]):
        if width not in DIMS:
            reason = f"{name} is {width}; the kernels have {', '.join(map(str, DIMS))}"
            return Because(reason, advice.padded(tensors, width, DIMS))
    return None


def replace(site: Site, graph: Graph) -> list[Node]:
    """`torch.ops.fusion_passes.chunk_delta_rule`, and its results in the memory order that the graph has."""
    meaning, gate, strength = (site.params[name] for name in ("meaning", "gate", "strength"))
    read, out = site.params["rows"], site.params["output"]
    tensors = [read[name].build(graph, dense=len(read[name].shape) == 4) for name in ("q", "k", "v", "g", "beta")]
    small: list[Node | None] = [None, None]
    kind, bound = "log", 0.0
    if gate is not None:
        kind = "softplus" if gate.gate.lower_bound is None else "bounded"
        bound = gate.gate.lower_bound or 0.0
        small = [
            None if leaf is None else rewrite.call(graph, aten.reshape.default, leaf, list(gate.shapes[leaf]))
            for leaf in (gate.gate.a_log, gate.gate.bias)
        ]
    state = site.leaves.get("initial_state")
    if state is not None and tuple(state.meta["val"].stride()) != contiguous_strides(state.meta["val"].shape):
        state = rewrite.call(graph, aten.clone.default, state, memory_format=torch.contiguous_format)
    fused = rewrite.call(
        graph, op.OP, *tensors, *small, state, None, meaning.scale, meaning.norm_eps, kind, bound,
        strength.factor if strength is not None else None, site.replaced.meta["val"].dtype, bool(site.also),
    )  # fmt: skip
    o = rewrite.call(graph, operator.getitem, fused, 0)
    if out.head_first:
        o = rewrite.call(graph, aten.permute.default, o, [0, 2, 1, 3])
    results = [_in_memory_order(graph, o, site.replaced)]
    if site.also:
        results.append(_in_memory_order(graph, rewrite.call(graph, operator.getitem, fused, 1), site.also[0]))
    return results


def _in_memory_order(graph: Graph, node: Node, old: Node) -> Node:
    """`node` with the strides of `old`: as it is, or else copied to a dense tensor of which `old` may be a slice."""
    ours, theirs = node.meta["val"], old.meta["val"]
    if all(a == b for a, b, n in zip(ours.stride(), theirs.stride(), theirs.shape) if n != 1):
        return node
    order = sorted(range(theirs.dim()), key=lambda axis: (-theirs.stride(axis), axis))
    moved = rewrite.call(graph, aten.permute.default, node, order)
    lengths = [theirs.shape[axis] for axis in order]
    steps = [theirs.stride(axis) for axis in order]
    extents = [lengths[0], *(outer // inner for outer, inner in zip(steps, steps[1:]))]
    widths = [extent - length for extent, length in zip(extents, lengths)]
    if any(width > 0 for width in widths):
        pads = [pad for width in reversed(widths) for pad in (0, max(width, 0))]
        copied = rewrite.call(graph, aten.constant_pad_nd.default, moved, pads, 0.0)
        for axis, (width, length) in enumerate(zip(widths, lengths)):
            if width > 0:
                copied = rewrite.call(graph, aten.slice.Tensor, copied, axis, 0, length)
    else:
        copied = rewrite.call(graph, aten.clone.default, moved, memory_format=torch.contiguous_format)
    return rewrite.call(graph, aten.permute.default, copied, [order.index(axis) for axis in range(theirs.dim())])


FUSION = Fusion(
    name="chunk_delta_rule",
    doc="gated delta rule (GDN, KDA) over a whole sequence, from its unrolled loop over chunks",
    anchors=ANCHORS,
    match=match,
    replace=replace,
    guard=guard,
    absorbs=("gate_cumsum", "delta_rule_intra"),
    tolerance=2e-2,
)
