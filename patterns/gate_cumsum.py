"""The gate of a (gated) delta rule, summed up inside each chunk.

Found: any subgraph that ends in a float32 `cumsum` over an axis of 16, 32, 64 or 128 positions, or in the product with
a triangle of ones that stands for one, and computes

    c[t, h, k] = s * sum of g[t', h, k] over t' <= t in the chunk of t
    g = -exp(A_log[h]) * softplus(raw + bias)            softplus gate, any beta and threshold
    g = lower * sigmoid(exp(A_log[h]) * (raw + bias))    bounded gate

whatever the spelling. `raw` is the one tensor that depends on time, `A_log` and `bias` are per head or per
channel, `s` is solved for. Axes are identified by how the cumsum's input reads its leaves, the formula by
evaluating it at random places (see `fusion_passes.probe`). The last chunk may be padded.

Near misses:

- sums in another dtype than float32, over another number of positions, or over a sequence that is not cut into chunks
- a gate that is reversed in time, or computed from anything else than one tensor per token, a factor and a bias
- values that depend on the position itself, and padding anywhere but behind the last token

Refused:

- a symbolic number of heads or channels; tokens and batch may be symbolic
- the gate itself is needed elsewhere, or saved for the backward pass
- heads or tokens that are not one axis of the tensors, so that the kernel cannot address them

Not worth it: `raw` is computed by a pointwise operator, which Inductor fuses with the gate.

Gains: one pass over memory in place of a gate and a scan: `raw` is read once, the sums are written once. Where the gate
is a small part of a model, so is the gain.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import advice, cone, rewrite
from fusion_passes.access import AxisMap, factor_axes
from fusion_passes.fusion import Context, Fusion, NearMiss, Reason, Refusal, Site, dtype_name
from fusion_passes.layout import Piece, SubAxis, arrange, refine_shape, sub_axes
from fusion_passes.ops import gate_cumsum as op
from fusion_passes.patterns._gate import Gate, identify
from fusion_passes.patterns._gate_axes import Axes, Frame, divide, roles
from fusion_passes.patterns._gate_places import check_hidden, check_read, check_tail
from fusion_passes.patterns._gate_sums import ANCHORS, Sum, summed, wanted
from fusion_passes.patterns._likeness import likeness
from fusion_passes.patterns._proofs import Proofs
from fusion_passes.sizes import Sizes, Unsupported
from fusion_passes.views import is_alias

aten, prims = torch.ops.aten, torch.ops.prims

REVERSALS = (aten.flip.default, prims.rev.default)
MAX_CUTS = 24


# Raw, the interior, the gate, the roles of the axes of a frame, and the axes of each leaf in them at the size hints.
Found = tuple[Node, set[Node], Gate, Axes, Frame, dict[Node, AxisMap]]
proofs: Proofs[Found] = Proofs()


def match(anchor: Node, context: Context) -> Site | None:
    """Prove that the cumsum at `anchor` is a chunk-local sum of a gate."""
    total = summed(anchor, context.sizes)
    if total is None:
        return None
    root, time = total.root, total.time
    chunk_size = _chunk_size(anchor, time)
    whole = cone.backward(root)
    if any(node.target in REVERSALS for node in whole.interior):
        raise NearMiss("the gate is reversed in time before the cumsum, which makes it a sum over later positions")
    alike = likeness(root, whole.leaves, context.sizes, time, chunk_size)
    found = alike.proved(proofs, lambda: _found(root, whole, time, chunk_size, context))
    return _site(anchor, total, *found, chunk_size, context)


def _found(root: Node, whole: cone.Cone, time: int, chunk_size: int, context: Context) -> Found:
    failure: NearMiss | None = None
    for raw, leaves, interior in _cuts(root, whole, time, context.sizes[0]):
        try:
            return (raw, interior, *_prove(root, raw, leaves, interior, time, chunk_size, context))
        except NearMiss as miss:
            failure = failure or miss
        except Unsupported as unsupported:
            failure = failure or NearMiss(f"cannot be evaluated: {unsupported}")
    raise failure or NearMiss("no tensor that depends on time was found among its inputs")


def _chunk_size(anchor: Node, time: int) -> int:
    value = anchor.meta["val"]
    if not value.dtype.is_floating_point:
        raise NearMiss(f"the cumsum is over {dtype_name(value.dtype)}, not a gate")
    if value.dtype != torch.float32:
        hint = "sum up in float32: .cumsum(dim, dtype=torch.float32)"
        raise NearMiss(f"the cumsum accumulates in {dtype_name(value.dtype)}; the kernel in float32", hint)
    length = value.shape[time]
    for size in op.CHUNK_SIZES:
        if statically_known_true(length == size):
            return size
    allowed = ", ".join(map(str, op.CHUNK_SIZES))
    hint = "a gate is summed within chunks: unflatten its tokens into chunks of one of these lengths"
    raise NearMiss(f"the cumsum runs over an axis of {length}; the kernel has chunks of {allowed}", hint)


def _cuts(root: Node, whole: cone.Cone, time: int, sizes: Sizes) -> Iterator[tuple[Node, list[Node], set[Node]]]:
    """Candidates for (raw, per-head leaves, interior), those that absorb most first.

    Raw is the only leaf that depends on time: a leaf of the whole cone, read through its last view, or else an
    intermediate from which on the rest is a gate.
    """
    timed = [leaf for leaf in whole.leaves if _depends_on(root, leaf, whole.leaves, time, sizes)]
    if len(timed) == 1:
        for view in dict.fromkeys((cone.last_alias(timed[0], whole.interior), timed[0])):
            yield _cut(root, view)
    numel = sizes.numel(root)
    tried = 0
    for node in sorted(whole.interior):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not cone.computes(node):
            continue
        if not numel // 2 <= sizes.numel(node) <= numel or node is root:
            continue
        _, rest, interior = _cut(root, node)
        if len(rest) <= 2 and not any(_depends_on(root, leaf, (node, *rest), time, sizes) for leaf in rest):
            yield node, rest, interior
            tried += 1
        if tried == MAX_CUTS:
            return


def _cut(root: Node, raw: Node) -> tuple[Node, list[Node], set[Node]]:
    """Raw, the other leaves, each at its last view, and the nodes between them and the root."""
    part = cone.backward(root, stop={raw})
    others = [cone.last_alias(leaf, part.interior) for leaf in part.leaves if leaf is not raw]
    part = cone.backward(root, stop={raw, *others})
    return raw, [leaf for leaf in part.leaves if leaf is not raw], part.interior


def _depends_on(root: Node, leaf: Node, leaves: Collection[Node], axis: int, sizes: Sizes) -> bool:
    try:
        return axis not in factor_axes(root, leaf, sizes, stop=leaves).unused
    except Unsupported:
        return True


def _prove(
    root: Node, raw: Node, leaves: list[Node], interior: set[Node], time: int, chunk_size: int, context: Context
) -> tuple[Gate, Axes, Frame, dict[Node, AxisMap]]:
    """The gate and the roles of the axes of a frame, the same under every admissible assignment of sizes."""
    if not 1 <= len(leaves) <= 2:
        names = ", ".join(leaf.name for leaf in leaves) or "none"
        raise NearMiss(f"a gate has a per-head factor and at most a bias beside its input, found: {names}")
    found: list[tuple[Gate, Axes, Frame]] = []
    at_hints: dict[Node, AxisMap] = {}
    for sizes in context.sizes:
        check_hidden(raw, interior, sizes)
        gate = identify(root, raw, leaves, interior, sizes)
        maps = {leaf: factor_axes(root, leaf, sizes, stop=(raw, *leaves)) for leaf in (raw, *leaves)}
        frame = divide(root, raw, gate, maps, time, sizes)
        if frame.divided:
            shape = frame.lengths(sizes.shape(root))
            maps = {leaf: factor_axes(root, leaf, sizes, stop=(raw, *leaves), shape=shape) for leaf in maps}
        axes = roles(raw, gate, maps, frame.first(time), chunk_size, sizes)
        _check_places(root, raw, maps, axes, sizes)
        found.append((gate, axes, frame))
        at_hints = at_hints or maps
    if any(other != found[0] for other in found[1:]):
        raise NearMiss("it is a gate for some sizes only", advice.STATIC)
    return (*found[0], at_hints)


def _check_places(root: Node, raw: Node, maps: dict[Node, AxisMap], axes: Axes, sizes: Sizes) -> None:
    """Every leaf is read wholly, the per-head ones alike in all chunks, and raw is hidden at its end at most."""
    repeated = [atom for index, atom in enumerate(maps[raw].atoms) if index not in maps[raw].used()]
    if repeated:
        raise NearMiss(f"its input is repeated {repeated[0].size} times")
    for leaf, axis_map in maps.items():
        if leaf is not raw and axes.chunk is not None and axes.chunk not in axis_map.unused:
            raise NearMiss(f"{leaf.name} is another one for every chunk")
    lengths = {leaf: check_read(axis_map, axes.time, axes.chunk, leaf is raw) for leaf, axis_map in maps.items()}
    clock = [axes.time] if axes.chunk is None else [axes.chunk, axes.time]
    walks = [*([axis] for axis in (*axes.batch, *axes.head, *axes.channel)), clock]
    check_tail(root, raw, maps[raw].root_shape, walks, axes.time, lengths[raw] or 0, sizes)


def _site(
    anchor: Node, total: Sum, raw: Node, interior: set[Node], gate: Gate, axes: Axes, frame: Frame,
    maps: dict[Node, AxisMap], chunk_size: int, context: Context,
) -> Site:  # fmt: skip
    replaced, scale = _trailing_scale(anchor)
    leaves = {"raw": raw, "a_log": gate.a_log} | ({"bias": gate.bias} if gate.bias is not None else {})
    shape = frame.lengths(context.sizes[0].shape(anchor))
    heads = math.prod(shape[a] for a in axes.head)
    channels = math.prod(shape[a] for a in axes.channel)
    per = f"{heads} heads x {channels} channels" if axes.channel else f"{heads} heads, one gate each"
    factor = gate.scale * total.factor * scale
    form = "softplus gate" if gate.lower_bound is None else "bounded gate"
    return Site(
        anchor=anchor,
        replaced=replaced,
        leaves=leaves,
        interior=interior | {anchor, replaced},
        params={
            "root": total.root,
            "gate": dataclasses.replace(gate, scale=factor),
            "axes": axes,
            "frame": frame,
            "maps": maps,
            "chunk_size": chunk_size,
            "sizes": context.sizes[0],
        },
        roundings=gate.roundings,
        summary=f"{form} of {dtype_name(raw.meta['val'].dtype)}, {per}, chunks of {chunk_size}, times {factor:.6g}",
    )


def _trailing_scale(anchor: Node) -> tuple[Node, float]:
    """A multiplication or division of the sums by a number that is their only use, folded into the scale."""
    users = list(anchor.users)
    if len(users) == 1 and users[0].target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        user = users[0]
        divides = user.target in (aten.div.Tensor, aten.div.Scalar)
        first, other = user.args[:2]
        if first is not anchor and not divides:
            first, other = other, first
        if first is anchor and isinstance(other, (int, float)) and math.isfinite(other) and other:
            return user, 1.0 / other if divides else float(other)
    return anchor, 1.0


def guard(site: Site, context: Context) -> Reason:
    """The kernel is compiled for a fixed number of heads and channels; only batch and tokens may be symbolic."""
    shape = site.params["frame"].lengths(site.anchor.meta["val"].shape)
    axes = site.params["axes"]
    for what, positions in (("heads", axes.head), ("channels", axes.channel)):
        if not all(isinstance(shape[axis], int) for axis in positions):
            return advice.symbolic(what)
    return None


def profit(site: Site, context: Context) -> Reason:
    """Leave the site alone where raw would have to be written to memory just for the fused op."""
    raw = site.leaves["raw"]
    if cone.is_transparent(raw) and cone.computes(raw):
        name = getattr(raw.target, "__name__", str(raw.target)).split(".")[0]
        return (
            f"the gate's input is computed by a pointwise node ({name}, {raw.name}), which Inductor fuses with the "
            "gate; the fused op would force it to memory"
        )
    return None


def replace(site: Site, graph: Graph) -> Node:
    """`torch.ops.fusion_passes.gate_cumsum` on views of the leaves, viewed as the shape that the graph had."""
    root, gate, axes, frame, sizes = (site.params[name] for name in ("root", "gate", "axes", "frame", "sizes"))
    shape, own = frame.lengths(sizes.shape(root)), root.meta["val"].shape
    maps = {name: site.params["maps"][leaf] for name, leaf in site.leaves.items()}
    pieces = refine_shape(list(maps.values()), shape, [isinstance(n, int) for n in frame.lengths(own)])
    times = frozenset({axes.time} | ({axes.chunk} if axes.chunk is not None else set()))
    heads = [p for axis in axes.head for p in pieces[axis]]
    channels = [p for axis in axes.channel for p in pieces[axis]]
    parts = sub_axes(maps["raw"], pieces, [times])
    groups, rest = _head_groups(parts, heads)
    batch = _in_order(parts, [p for axis in axes.batch for p in pieces[axis]])
    clock = [p for p in parts if p.pieces[0].axis in times]
    in_order = [p for axis in (axes.chunk, axes.time) if axis is not None for p in pieces[axis]]
    if [p.pieces for p in clock] != [tuple(in_order)]:
        raise Refusal("its tokens are not one axis of its input")
    lanes = _in_order(parts, channels)
    raw = arrange(graph, site.leaves["raw"], parts, [batch, clock, groups, rest, lanes])
    counts = [math.prod(q.size for p in group for q in p.pieces) for group in (groups, rest, lanes)]
    small = [
        _per_head(graph, site.leaves[name], maps[name], pieces, heads, channels, counts) if name in maps else None
        for name in ("a_log", "bias")
    ]
    chunks = 1 if axes.chunk is None else frame.lengths(own)[axes.chunk]
    if not isinstance(chunks, int):  # an axis of symbolic size is not divided: it is one of the sums
        chunks = rewrite.known_size(graph, root, frame.lengths(range(len(own)))[axes.chunk])
    order = frame.strides(sizes.strides(site.replaced))
    memory = sorted((a for a, n in enumerate(shape) if n > 1), key=lambda a: -order[a])
    layout = _layout(axes, memory)
    out = rewrite.call(
        graph, torch.ops.fusion_passes.gate_cumsum.default, raw, *small, chunks, site.params["chunk_size"],
        gate.lower_bound, gate.scale, gate.beta, gate.threshold, gate.pad_gate, layout, None, None,
    )
    framed = _in_frame(graph, out, layout, axes, memory, frame.lengths(own))
    if not frame.divided:
        return framed
    lengths = [n if isinstance(n, int) else rewrite.size(graph, framed, frame.first(a)) for a, n in enumerate(own)]
    merged = rewrite.call(graph, aten.reshape.default, framed, lengths)
    if not is_alias(merged, framed):
        raise Refusal("the axes of the sums cannot be put together without a copy")
    return merged


def _head_groups(parts: list[SubAxis], heads: list[Piece]) -> tuple[list[SubAxis], list[SubAxis]]:
    """The head axes as groups and heads within a group; one of them is empty where one stride serves all heads."""
    found = _in_order(parts, heads)
    if len(found) <= 1:
        return [], found
    if len(found) == 2:
        return [found[0]], [found[1]]
    raise Refusal(f"its heads are spread over {len(found)} axes; the kernel reads two")


def _in_order(parts: list[SubAxis], wanted: list[Piece]) -> list[SubAxis]:
    return [part for piece in wanted for part in parts if part.pieces == (piece,)]


def _per_head(
    graph: Graph, leaf: Node, axis_map: AxisMap, pieces: dict[int, list[Piece]], heads: list[Piece],
    channels: list[Piece], counts: list[int],
) -> Node:
    """A per-head or per-channel leaf as [groups, heads per group, channels], with zero strides where it repeats."""
    parts = sub_axes(axis_map, pieces)
    grouped = [heads[:1], heads[1:]] if len(heads) == 2 else [[], heads]
    groups = [_in_order(parts, group) for group in (*grouped, channels)]
    if any(found and len(found) < len(group) for found, group in zip(groups, (*grouped, channels))):
        raise Refusal(f"{leaf.name} is repeated within the heads or channels")
    view = arrange(graph, leaf, parts, groups)
    return rewrite.call(graph, aten.expand.default, view, counts)


def _layout(axes: Axes, memory: list[int]) -> str:
    """The order of the output's axes in memory, as the op spells it."""
    role = {**dict.fromkeys(axes.batch, "b"), **dict.fromkeys(axes.head, "h"), **dict.fromkeys(axes.channel, "k")}
    role |= {axes.time: "c"} | ({axes.chunk: "n"} if axes.chunk is not None else {})
    runs = "".join(letter for letter, _ in itertools.groupby(role[axis] for axis in memory))
    ascending = all(list(g) == sorted(g) for g in ([a for a in memory if role[a] == x] for x in "bhk"))
    if len(set(runs)) < len(runs) or not ascending:
        raise Refusal("its batch, head or channel axes are not next to one another in the result")
    return "".join(letter for letter in "bnhkc" if letter not in runs) + runs


def _in_frame(graph: Graph, out: Node, layout: str, axes: Axes, memory: list[int], shape: list[Any]) -> Node:
    """View the op's result, which lies in memory order, as the shape and axis order of the frame."""
    single = {"n": axes.chunk, "c": axes.time, "b": axes.batch, "h": axes.head, "k": axes.channel}
    idle = [axis for axis in range(len(shape)) if axis not in memory]
    # A reshape alone, where the axes lie in order: what it gives is then written to memory as it is.
    ordered = sorted(idle + memory) if memory == sorted(memory) else idle + memory
    lengths: list[int | Node] = []
    for axis in ordered:
        length = shape[axis]
        if axis in idle:
            lengths.append(1)
        elif isinstance(length, int):
            lengths.append(length)
        else:
            letter = next(x for x, a in single.items() if a == axis or (isinstance(a, tuple) and axis in a))
            lengths.append(rewrite.size(graph, out, layout.index(letter)))
    node = out
    if lengths != list(out.meta["val"].shape):
        node = rewrite.call(graph, aten.reshape.default, out, lengths)
    back = [ordered.index(axis) for axis in range(len(shape))]
    return node if back == sorted(back) else rewrite.call(graph, aten.permute.default, node, back)


FUSION = Fusion(
    name="gate_cumsum",
    doc="KDA/GDN gate (softplus or bounded) with its chunk-local cumsum, in one pass",
    anchors=ANCHORS,
    match=match,
    replace=replace,
    guard=guard,
    profit=profit,
    wants=wanted,
)
