"""What a site costs as the model is written: bytes to and from memory, launches, and memory held at once.

All three are estimates, and lower bounds of what Inductor makes of the graph without the fusion: they count the results
of operators that it always writes to memory, such as products, sums and scans, each written once and read once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch.fx import Node

from fusion_passes import aten, cone
from fusion_passes.evaluate import constant
from fusion_passes.fusion import Site
from fusion_passes.sizes import Sizes, Unsupported


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one call is spared where a site is fused, at the size hints; None where nothing is known.

    Attributes:
        traffic: bytes written and read.
        launches: kernels launched.
        held: bytes that intermediates hold at once.
    """

    traffic: int | None = None
    launches: int | None = None
    held: int | None = None


def of_site(site: Site, sizes: Sizes) -> Estimate:
    """What the fusion says itself, and for the rest what can be counted in the graph, before it is rewritten."""
    if site.rewrite is not None:
        return Estimate(site.saved_bytes, site.saved_launches)  # it writes to memory that is there in any case
    try:
        nodes = between(site)
        written = [node for node in nodes if _is_written(node) and not _stays(node, site)]
        traffic = 2 * sum(_bytes(node, sizes) for node in written) if site.saved_bytes is None else site.saved_bytes
        launches = len(written) if site.saved_launches is None else site.saved_launches
        return Estimate(traffic or site.saved_bytes, launches or site.saved_launches, held(nodes, site, sizes))
    except Unsupported:
        return Estimate(site.saved_bytes, site.saved_launches)


def between(site: Site) -> list[Node]:
    """The nodes between leaves and results, in graph order.

    Where the site does not say which they are, those that Inductor computes on the fly, and writes into slices.
    """

    def belongs(node: Node) -> bool:
        if not site.interior:
            return _on_the_fly(node)
        return node in site.interior or any(cone.carries(node, leaf) for leaf in site.leaves.values())

    stop, seen = set(site.leaves.values()), set(site.outputs)
    stack = list(seen)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in stop and source not in seen and (belongs(source) or _is_constant(source)):
                seen.add(source)
                stack.append(source)
    return sorted(seen)


def constants(nodes: Iterable[Node]) -> set[Node]:
    """Those of `nodes`, which are in graph order, that are computed from no tensor of the model."""
    found: set[Node] = set()
    for node in nodes:
        if node.op == "call_function" and has_tensor(node) and not node.is_impure():
            sources = [source for source in node.all_input_nodes if has_tensor(source)]
            if found.issuperset(sources) and (sources or node.target in aten.FILLS):
                found.add(node)
    return found


def _is_constant(node: Node) -> bool:
    """Is `node` alone one of the `constants` of its graph? For a few nodes of a large graph."""
    return has_tensor(node) and constant(node, None)


def held(nodes: Sequence[Node], site: Site, sizes: Sizes) -> int | None:
    """Most bytes that tensors written to memory between leaves and results hold at once."""
    order = {node: i for i, node in enumerate(nodes)}
    last: dict[Node, int] = {}
    for node in reversed(nodes):
        users = [user for user in node.users if user in order]
        last[node] = max((last[u] if _on_the_fly(u) else order[u] for u in users), default=order[node])
    changes = [0] * (len(nodes) + 1)
    for node in nodes:
        if _is_written(node) and not _stays(node, site):
            size = _bytes(node, sizes)
            changes[order[node]] += size
            changes[last[node] + 1] -= size
    now = most = 0
    for change in changes:
        now += change
        most = max(most, now)
    return most or None


def _on_the_fly(node: Node) -> bool:
    """Does Inductor compute `node` where it is read, without writing it to memory?"""
    return cone.is_transparent(node) or node.target in aten.SCATTERS


def has_tensor(node: Node) -> bool:
    """Is the value of a node a tensor, or a tuple with one?"""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (list, tuple)) and any(isinstance(part, torch.Tensor) for part in value)
    )


def _is_written(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and not _on_the_fly(node)


def _stays(node: Node, site: Site) -> bool:
    return node in site.outputs or node in site.shared


def _bytes(node: Node, sizes: Sizes) -> int:
    return sizes.numel(node) * int(node.meta["val"].dtype.itemsize)
