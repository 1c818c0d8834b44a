"""A top-k that is only asked which entries it selects.

Found: `topk` along the last axis, whose values nothing reads and whose indices only `scatter` a constant along the same
axis, over the whole of a tensor:

    mask = torch.full_like(scores, -inf).scatter(-1, scores.topk(k).indices, 0.0)    # scores [.., T], k < T

The order of the indices means nothing to the scatter, so that nothing has to be sorted: the op marks the k greatest
entries of every row (or the k least, with `largest=False`), and each scatter becomes `where(marked, number, base)`,
which Inductor computes together with what reads it. This is the selection of sparse attention (DeepSeek-V3.2 selects
2,048 keys). Of entries that are equal to the k-th the op takes those in front; PyTorch leaves open which `topk` takes.

Near misses:

- indices that are returned, or go to an operator for which their order matters, such as `gather`
- a scatter of a tensor, along another axis than that of the selection, or over a part of a tensor only

Nothing is recorded of a `topk` whose values are read, of a symbolic k, or of rows of a symbolic length. One that
selects every entry of a row is left to `full_topk`.

Refused:

- a selection along another axis than the last
- scores that are not float32, bfloat16 or float16
- rows of more than 32,768 entries, which a program cannot hold in its registers
- scores whose neighbouring entries are not neighbours in memory, or whose rows lie at more than two strides

Not worth it: rows of fewer than 1,024 entries.

Gains: the sort. One launch reads the scores once and writes a byte for each, in place of a selection, a sort of what
was selected, a tensor that is filled, and a scatter into it.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_passes import advice, rewrite
from fusion_passes import aten as semantics
from fusion_passes.fusion import Because, Context, Fusion, Reason, Site, dtype_name
from fusion_passes.ops import topk_mask as op
from fusion_passes.patterns import _topk_indices as selection

aten = torch.ops.aten

# Entries of a row with which the fused op is measured to gain; `op.LONGEST` is the most that it takes.
SHORTEST = 1024


def selects_some(anchor: Node) -> bool:
    """Are k and the length of the axis known when the graph is compiled, and is k the smaller of them?"""
    sizes = selection.known(anchor)
    return sizes is not None and 1 <= sizes[0] < sizes[1]


def match(anchor: Node, context: Context) -> Site | None:
    """Follow the indices to the scatters that they end in."""
    found, sizes = selection.follow(anchor), selection.known(anchor)
    if found is None or sizes is None:
        return None
    steps, scatters = found
    bases = {
        f"base_{n}": base
        for n, s in enumerate(scatters)
        if isinstance(base := s.args[0], Node) and semantics.fill_of(base) is None
    }
    kind = "greatest" if semantics.arguments(anchor)["largest"] else "least"
    dtype = dtype_name(selection.scores_of(anchor).meta["val"].dtype)
    summary = f"the {sizes[0]} {kind} of {sizes[1]} entries are marked, {dtype} scores"
    return selection.site(anchor, steps, scatters, bases, summary, context.sizes[0])


def guard(site: Site, context: Context) -> Reason:
    """The kernel reads rows of up to `op.LONGEST` neighbouring entries, which lie at one or two strides."""
    scores = site.leaves["scores"].meta["val"]
    axis, length = selection.axis_of(site.anchor), scores.shape[-1]
    if axis != scores.dim() - 1:
        return Because(
            f"it selects along axis {axis} of {scores.dim()}; the kernel reads rows along the last one",
            "move the axis of the selection to the end, and make the scores contiguous there",
        )
    if scores.dtype not in op.FLOATS:
        reason = f"scores is {dtype_name(scores.dtype)}; the kernel reads {advice.listed(op.FLOATS)}"
        return Because(reason, advice.stored("scores", op.FLOATS))
    if length > op.LONGEST:
        return f"its rows have {length} entries; {_GAINS}"
    if not statically_known_true(scores.stride(-1) == 1):
        reason = f"the scores have strides {list(scores.stride())}; the kernel reads rows of neighbouring entries"
        return Because(reason, advice.adjacent("the scores", "entries"))
    if len(op.outer_axes(scores.shape, scores.stride())) > 2:
        reason = f"the rows of the scores lie at more than two strides: {list(scores.stride())}"
        return Because(reason, "lay out the scores by .contiguous() before the selection")
    return None


_GAINS = f"rows of {SHORTEST:,} to {op.LONGEST:,} entries are measured to gain"


def profit(site: Site, context: Context) -> Reason:
    """Rows below `SHORTEST` have not been measured."""
    length = site.leaves["scores"].meta["val"].shape[-1]
    return f"its rows have {length} entries; {_GAINS}" if length < SHORTEST else None


def replace(site: Site, graph: Graph) -> list[Node]:
    """The mask once, and for every scatter a choice between its number and what it writes to."""
    given = semantics.arguments(site.anchor)
    mask = rewrite.call(graph, op.OP, site.leaves["scores"], given["k"], given["largest"])
    # One of the results may be the mask itself, and no two may be.
    itself = next((scatter for scatter in site.outputs if _is_mask(scatter)), None)
    return [mask if scatter is itself else _chosen(graph, mask, scatter) for scatter in site.outputs]


def _is_mask(scatter: Node) -> bool:
    """Does `scatter` write True to a tensor of False?"""
    base, number = scatter.args[0], scatter.args[3]
    assert isinstance(base, Node)
    return base.meta["val"].dtype == torch.bool and bool(number) and semantics.fill_of(base) == 0


def _chosen(graph: Graph, mask: Node, scatter: Node) -> Node:
    base, number = scatter.args[0], scatter.args[3]
    assert isinstance(base, Node) and isinstance(number, (bool, int, float))
    value, fill = base.meta["val"], semantics.fill_of(base)
    form = {"dtype": value.dtype, "device": value.device}
    marked = rewrite.call(graph, aten.full.default, [], number, **form)
    # A constant of its own: that of the graph may be made only behind the first reader of another scatter.
    rest = base if fill is None else rewrite.call(graph, aten.full.default, [], fill, **form)
    return rewrite.call(graph, aten.where.self, mask, marked, rest)


def distinct(name: str, values: torch.Tensor) -> torch.Tensor:
    """Random scores for `verify` of which no two in a row are equal: which of equal ones are selected is left open."""
    if name != "scores":
        return values
    place = values.float().argsort(-1).argsort(-1) - values.shape[-1] // 2
    if values.dtype == torch.float32:
        scores = place.float()
    else:
        scores = place.abs().to(torch.int16).view(values.dtype).copysign(place)  # the bits of a number are in order
    return scores if 0 in values.stride() else values.copy_(scores)


FUSION = Fusion(
    name="topk_mask",
    doc="which entries of a row a top-k selects, as a mask, without a sort",
    anchors=(aten.topk.default,),
    match=match,
    guard=guard,
    profit=profit,
    replace=replace,
    wants=selects_some,
    dtypes=selection.DTYPES,
    tolerance=0.0,
    draw=distinct,
)
