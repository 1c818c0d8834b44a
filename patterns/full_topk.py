"""A top-k that selects every entry, and is only asked which.

Found: `topk` along an axis that has k entries, whose values nothing reads and whose indices only `scatter` a constant
along the same axis, over the whole of a tensor:

    mask = ones.scatter(-1, scores.topk(k).indices, False)    # scores [.., k]

The indices are every position of a row once, in an order that does not matter to the scatter, whatever the scores are,
NaN included. So the result is that constant everywhere, and what computed the scores is dead code. This is what sparse
attention comes to where a prompt has no more tokens than a query may select (2,048 in DeepSeek-V3.2), and routing where
all groups of experts are kept.

Near misses:

- indices that are returned, or go to an operator for which their order matters, such as `gather`
- a scatter of a tensor, along another axis than that of the selection, or over a part of a tensor only

Nothing is recorded of a `topk` of fewer than all entries, which is for `topk_mask`, of a symbolic number of entries, or
whose values are read.

Gains: the sort, and all that only its scores needed: the projections, products and reductions of an indexer. There is
no fused op and nothing to tune: a constant takes the place of the subgraph.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from fusion_passes import rewrite
from fusion_passes.fusion import Context, Fusion, Site
from fusion_passes.patterns import _topk_indices as selection

aten = torch.ops.aten


def selects_all(anchor: Node) -> bool:
    """Is k the length of the axis, known when the graph is compiled?"""
    sizes = selection.known(anchor)
    return sizes is not None and sizes[0] == sizes[1]


def match(anchor: Node, context: Context) -> Site | None:
    """Follow the indices to the scatters that they end in."""
    found, sizes = selection.follow(anchor), selection.known(anchor)
    if found is None or sizes is None:
        return None
    steps, scatters = found
    bases = {f"base_{n}": base for n, s in enumerate(scatters) if isinstance(base := s.args[0], Node)}
    summary = f"all of {sizes[1]} entries are selected, whatever their scores"
    return selection.site(anchor, steps, scatters, bases, summary, context.sizes[0])


def replace(site: Site, graph: Graph) -> list[Node]:
    """The constants, as tensors of the shapes and dtypes of what was written to."""
    return [_constant(graph, scatter) for scatter in site.outputs]


def _constant(graph: Graph, scatter: Node) -> Node:
    base, number = scatter.args[0], scatter.args[3]
    assert isinstance(base, Node)
    value = base.meta["val"]
    shape = [rewrite.known_size(graph, base, axis) for axis in range(value.dim())]
    return rewrite.call(graph, aten.full.default, shape, number, dtype=value.dtype, device=value.device)


FUSION = Fusion(
    name="full_topk",
    doc="a top-k that selects every entry of a row, and all that computed its scores, removed",
    anchors=(aten.topk.default,),
    match=match,
    replace=replace,
    wants=selects_all,
    dtypes=selection.DTYPES,
    tolerance=0.0,
)
