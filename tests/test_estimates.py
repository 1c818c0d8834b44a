"""What a site costs as the model is written."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_passes import estimates, explain
from fusion_passes.fusion import Site
from fusion_passes.sizes import assignments

KILO = 4 * 16 * 16  # bytes of a tensor


def site() -> Site:
    """Three products of 16 x 16 in float32 with pointwise work between them; the last one is the result."""

    def f(x: torch.Tensor) -> torch.Tensor:
        first = x @ x
        second = (first + 1) @ x
        return (first * second).relu() @ x

    graph = make_fx(f, tracing_mode="fake")(torch.randn(16, 16)).graph
    nodes = {node.name: node for node in graph.nodes}
    last = nodes["mm_2"]
    interior: set[Node] = {nodes[name] for name in ("mm", "add", "mm_1", "mul", "relu")}
    return Site(last, last, {"x": next(iter(nodes.values()))}, interior)


def test_what_is_written_to_memory_counts() -> None:
    one = site()
    sizes = assignments(one.anchor.graph)[0]
    # Both inner products are written and read, and are there at once; what is pointwise is computed on the fly.
    assert estimates.of_site(one, sizes) == estimates.Estimate(traffic=4 * KILO, launches=2, held=2 * KILO)


def test_what_the_fusion_says_comes_first_and_what_others_need_does_not_count() -> None:
    one = site()
    sizes = assignments(one.anchor.graph)[0]
    told = dataclasses.replace(one, saved_bytes=7, saved_launches=0)
    assert estimates.of_site(told, sizes) == estimates.Estimate(traffic=7, launches=0, held=2 * KILO)
    first = next(node for node in one.interior if node.name == "mm")
    shared = dataclasses.replace(one, shared=frozenset({first}))
    assert estimates.of_site(shared, sizes) == estimates.Estimate(traffic=2 * KILO, launches=1, held=KILO)
    in_place = dataclasses.replace(told, rewrite=lambda: None)
    assert estimates.of_site(in_place, sizes) == estimates.Estimate(traffic=7, launches=0)


def test_sites_of_a_model_have_all_three() -> None:
    (record,) = explain(scores, torch.randn(1, 64, 8, 64), torch.randn(1, 256, 64), torch.randn(1, 64, 8)).fused
    products = 4 * 64 * 8 * 256
    assert (record.saved_bytes, record.saved_memory) == (2 * products, products)
    report = explain(scores, torch.randn(1, 64, 8, 64), torch.randn(1, 256, 64), torch.randn(1, 64, 8))
    assert "524.3 kB of intermediates at once are no longer in memory" in str(report)


def scores(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return ((q @ k.transpose(-1, -2).unsqueeze(1)).relu() * w.unsqueeze(-1)).sum(2)
