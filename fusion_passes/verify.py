"""The `verify` setting: run a matched subgraph and its replacement on random inputs before the graph is changed.

Matching proves the meaning of a subgraph; this checks the kernel, on the user's device and at the real shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fusion_passes.fusion import Fusion, Refusal, Site
from fusion_passes.sizes import Sizes

log = logging.getLogger(__name__)


def check(fusion: Fusion, site: Site, new: Sequence[Node], sizes: Sizes) -> None:
    """Compare each of `site.outputs` with its replacement on random leaves of the real shapes, strides and dtypes.

    Symbolic sizes take their hints. Nothing is checked for a device that this machine does not have.

    Raises:
        Refusal: the relative error (L2 norm) exceeds the fusion's tolerance, or the values are NaN or infinite in
            different places.
    """
    device = site.replaced.meta["val"].device
    if _is_missing(device, fusion, site.anchor):
        return
    drawn = _random_leaves(device, site.leaves.values(), sizes)
    leaves = {leaf: fusion.draw(name, drawn[leaf]) for name, leaf in site.leaves.items()}
    graph = site.anchor.graph
    for old, replacement in zip(site.outputs, new, strict=True):
        with torch.no_grad():
            expected = run(graph, old, leaves, sizes).double()
            actual = run(graph, replacement, leaves, sizes).double()
        _compare(fusion, actual, expected)


def check_in_place(
    fusion: Fusion, shown: Mapping[Node, Node], writes: Sequence[Node], leaves: Iterable[Node], sizes: Sizes
) -> None:
    """As `check`, for new nodes that write into a leaf; to be called before any old node changes.

    The error is relative to the L2 norm of what the writes change, so that the rest of a large tensor does not hide it.

    Args:
        fusion: its tolerance counts.
        shown: for each old node, the view of the leaf that takes its place once `writes` have run.
        writes: the new nodes that write, in their order.
        leaves: the tensors from which old and new nodes are computed.
        sizes: what symbolic sizes are taken to be.
    """
    first = next(iter(shown))
    device = first.meta["val"].device
    if _is_missing(device, fusion, first):
        return
    given = _random_leaves(device, leaves, sizes)
    graph = first.graph
    with torch.no_grad():
        views = {old: run(graph, view, given, sizes) for old, view in shown.items()}
        earlier = {old: view.to(torch.float64, copy=True) for old, view in views.items()}
        expected = {old: run(graph, old, given, sizes).to(torch.float64, copy=True) for old in shown}
        for write in writes:
            run(graph, write, given, sizes)
    for old, view in views.items():
        _compare(fusion, view.double(), expected[old], (expected[old] - earlier[old]).norm())


def _is_missing(device: torch.device, fusion: Fusion, place: Node) -> bool:
    if device.type != "cuda" or torch.cuda.is_available():
        return False
    log.info("%s at %s is not verified: this machine has no GPU", fusion.name, place.name)
    return True


def _random_leaves(device: torch.device, leaves: Iterable[Node], sizes: Sizes) -> dict[Node, torch.Tensor]:
    generator = torch.Generator(device=device).manual_seed(0)
    return {leaf: _random_like(leaf, sizes, generator) for leaf in leaves}


def _compare(
    fusion: Fusion, actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None
) -> None:
    """Raise a Refusal unless both are near, as `check` says; `scale` is what the error is relative to."""
    if not torch.equal(expected.isnan(), actual.isnan()):
        raise Refusal("verify: the fused op and the subgraph are NaN in different places")
    infinite = expected.isinf()
    if not torch.equal(infinite, actual.isinf()) or not torch.equal(expected[infinite], actual[infinite]):
        raise Refusal("verify: the fused op and the subgraph are infinite in different places")
    finite = expected.isfinite()
    norm = expected[finite].norm() if scale is None else scale
    error = (actual - expected)[finite].norm() / norm.clamp_min(1e-30)
    if not error <= fusion.tolerance:
        raise Refusal(
            f"verify: the fused op differs from the subgraph by {error:.1e} (relative L2), more than the "
            f"{fusion.tolerance:.0e} that {fusion.name} allows"
        )


def run(graph: Graph, target: Node, leaves: dict[Node, torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """The value of `target` computed eagerly from the given leaf values."""
    needed = _ancestors(target, leaves)
    values: dict[Node, Any] = dict(leaves)
    for node in graph.nodes:
        if node not in needed or node in values:
            continue
        if isinstance(node.meta.get("val"), (torch.SymInt, int)):
            values[node] = sizes.of(node)
            continue
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = node.target(*args, **kwargs)
    return values[target]


def _ancestors(target: Node, leaves: Iterable[Node]) -> set[Node]:
    found: set[Node] = set(leaves)
    stack = [target]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if not isinstance(node.meta.get("val"), (torch.SymInt, int)):
                stack += node.all_input_nodes
    return found


def _random_like(leaf: Node, sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
    value = leaf.meta["val"]
    shape, strides = sizes.shape(leaf), sizes.strides(leaf)
    storage = 1 + sum((n - 1) * s for n, s in zip(shape, strides)) if all(shape) else 0
    flat = torch.randn(storage, generator=generator, device=value.device, dtype=torch.float32)
    return flat.to(value.dtype).as_strided(shape, strides)
