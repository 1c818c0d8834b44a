"""Symbolic numbers of tokens, for all fusions: results are eager's, guards and recompiles those of stock Inductor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked
from torch.fx import Graph
from torch.utils._pytree import tree_leaves

from fusion_passes.explanation import tracing_backend
from fusion_passes.graph_pass import FusionPass
from fusion_passes.settings import snapshot
from fusion_passes.testing import assert_same
from tests.support.sites import SITES, Site, fusion_of
from tests.support.versions import not_on_2_11

# One compile each: what it fused, its guards, the ranges of its symbols.
Compiles = list[tuple[list[str], list[str], list[str]]]
Mark = Callable[[Tensor, int], None]


def dynamic(tensor: Tensor, axis: int) -> None:
    torch._dynamo.mark_dynamic(tensor, axis)


def bounded(tensor: Tensor, axis: int) -> None:
    torch._dynamo.mark_dynamic(tensor, axis, min=2, max=4096)


def left_to_dynamo(tensor: Tensor, axis: int) -> None:
    """The first call is compiled for its sizes, the second one for symbols."""


def known_of_sizes() -> tuple[list[str], list[str]]:
    """The guards on sizes so far, and the ranges of the symbols."""
    context = torch._guards.TracingContext.get()
    assert context.fake_mode is not None
    env = context.fake_mode.shape_env
    if env is None:
        return [], []
    return [str(guard.expr) for guard in env.guards], [f"{name}: {value}" for name, value in env.var_to_range.items()]


class Watched(FusionPass):
    """The pass adds no guard itself."""

    def __call__(self, graph: Graph) -> None:
        before = known_of_sizes()
        super().__call__(graph)
        assert known_of_sizes() == before


def compiles(site: Site, fusions: str, mark: Mark, lengths: Iterable[int]) -> Compiles:
    """Calls with several lengths, whose results are compared with eager's."""
    found: Compiles = []

    def backend(gm: Any, inputs: Any) -> Any:
        own = {"strict": True, "reference_on_cpu": True, "always_profitable": True, "fusions": fusions}
        explained = Watched(snapshot(own))
        run = tracing_backend(explained, run_rewritten=True)(gm, inputs)
        found.append(([r.fusion for r in explained.found if r.outcome == "fused"], *known_of_sizes()))
        return run

    torch._dynamo.reset()
    compiled = torch.compile(site.function, backend=backend, fullgraph=True)
    for length in lengths:
        ours, theirs = site.inputs(length), site.inputs(length)
        for tensor, shape in zip(ours, site.shapes):
            for axis in [axis for axis, size in enumerate(shape) if size == "t"]:
                mark(tensor, axis)
        calls = ((compiled, ours), (site.function, theirs))
        actual, expected = ([x.float() for x in tree_leaves(f(*given))] for f, given in calls)
        assert_same((actual, ours), (expected, theirs), 1e-4, 1e-4)
    return found


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def check(name: str, mark: Mark, lengths: Iterable[int], also: Iterable[int] = ()) -> list[int]:
    """Guards and recompiles for `lengths` are those without fusions; returns the sites of each compile, `also` too."""
    stock = compiles(SITES[name], "none", mark, lengths)
    ours = compiles(SITES[name], fusion_of(name), mark, [*lengths, *also])
    assert [seen[1:] for seen in ours[: len(stock)]] == [seen[1:] for seen in stock]
    assert also or len(ours) == len(stock)
    return [len(fused) for fused, _, _ in ours]


SYMBOLIC = [name for name, site in SITES.items() if site.symbolic]
# Their padding to whole chunks has guards of its own, which no bounds allow and which no unbacked size can pass.
CHUNKED = {"gate_cumsum", "delta_rule_intra"}
FREE = [name for name in SYMBOLIC if name not in CHUNKED]


@pytest.mark.parametrize("name", SYMBOLIC)
def test_any_number_of_tokens(name: str) -> None:
    """Fewer than a chunk has, one and none among them; for the last two there is a graph each, as Dynamo has it."""
    if name in CHUNKED:  # slow to trace
        lengths = (40, 17, 1, 0) if name == "gate_cumsum" else (40, 17)
        sites = [len(fused) for fused, _, _ in compiles(SITES[name], name, dynamic, lengths)]
        assert len(sites) == len(lengths) - 1
    else:
        sites = check(name, dynamic, (40, 17), also=(1, 0))
        assert len(sites) <= 3
    assert sites[0] == 1 or name == "redundant_copy"  # whose order of writes is open without bounds


@pytest.mark.parametrize("name", ["redundant_copy", "mla_kv_pack", "full_topk"])
def test_bounds_that_are_given(name: str) -> None:
    assert check(name, bounded, (40, 17)) == [1]


@pytest.mark.parametrize("name", ["full_topk", "qkv_split"])
def test_sizes_that_become_symbolic_at_the_second_call(name: str) -> None:
    assert check(name, left_to_dynamo, (40, 17, 64)) == [1, 1]


@pytest.mark.parametrize("name", FREE)
def test_sizes_without_a_number(name: str) -> None:
    """No guard can be asked about them: one would be an error."""
    not_on_2_11("cannot trace the assignment itself", name == "redundant_copy")
    assert len(compiles(SITES[name], fusion_of(name), mark_unbacked, (40, 17))) == 1
