"""Sites whose fused op provides several values: where it goes, what is checked, and that all moves or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

from fusion_passes import guards, registry, rewrite
from fusion_passes.explanation import tracing_backend
from fusion_passes.fusion import Context, Fusion, Refusal, Site
from fusion_passes.graph_pass import FusionPass
from fusion_passes.reports import Report
from fusion_passes.settings import snapshot
from fusion_passes.testing import run_fused
from tests.tracing import trace

aten = torch.ops.aten


def match(anchor: Node, context: Context) -> Site | None:
    """The sine at `anchor` and the next one of the graph, as one site."""
    sines = [n for n in context.graph.nodes if n.target is aten.sin.default]
    later = sines[sines.index(anchor) + 1 :]
    if not later:
        return None
    both = (anchor, later[0])
    leaves = {name: node.all_input_nodes[0] for name, node in zip("ab", both)}
    return Site(anchor, both[0], leaves, set(both), also=both[1:], summary="two sines")


def replace(site: Site, graph: Graph) -> list[Node]:
    return [rewrite.call(graph, aten.cos.default, _turned(graph, leaf)) for leaf in site.leaves.values()]


def _turned(graph: Graph, leaf: Node, by: float = torch.pi / 2) -> Node:
    return rewrite.call(graph, aten.sub.Tensor, leaf, by)


@contextlib.contextmanager
def planted(**stages: Any) -> Iterator[None]:
    """sin(a), sin(b) as cos(a - pi/2), cos(b - pi/2), in one site."""
    fusion = Fusion(**{
        "name": "two_sines", "doc": "", "anchors": (aten.sin.default,), "match": match, "replace": replace, **stages,
    })  # fmt: skip
    registry.known()
    registry._fusions["two_sines"] = fusion
    try:
        yield
    finally:
        del registry._fusions["two_sines"]


def run(f: Callable[..., Any], *args: Tensor, stages: dict[str, Any] | None = None, **own: Any) -> tuple[Any, Report]:
    with planted(**(stages or {})):
        return run_fused(f, *args, fusions="two_sines", **own)


def draw() -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(0, 2, 12).reshape(3, 4)


def test_both_values_move_in_one_site() -> None:
    def f(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.sin() + 1, b.sin() * 2

    actual, report = run(f, *draw())
    torch.testing.assert_close(actual, f(*draw()))
    assert [r.outcome for r in report.records] == ["fused"]


def test_anchors_that_an_earlier_site_took_are_not_looked_at() -> None:
    def f(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return a.sin() + 1, b.sin() * 2, (a * 2).sin(), (b * 2).sin()

    actual, report = run(f, *draw())
    torch.testing.assert_close(actual, f(*draw()))
    assert [r.outcome for r in report.records] == ["fused", "fused"]


def test_the_op_goes_behind_its_last_leaf() -> None:
    def f(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        first = a.sin()
        later = b.mm(a.T).mm(b)
        return later.sin() * 2, first + 1

    actual, report = run(f, *draw())
    torch.testing.assert_close(actual, f(*draw()))
    assert report.counts["two_sines"] == 1


def test_a_value_that_is_needed_before_the_last_leaf_is_known() -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        return (a.sin().mm(b.T)).mm(b).sin() * 2

    actual, report = run(f, *draw())
    torch.testing.assert_close(actual, f(*draw()))
    (record,) = report.records
    assert record.outcome == "refused" and "is needed by" in record.reason and "before" in record.reason


def later_view(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    first = a.sin() + 1
    return first, b.view(2, 6).T[1:].sin()


def test_views_that_come_late_are_put_before_what_reads_the_first_value() -> None:
    actual, report = run(later_view, *draw())
    torch.testing.assert_close(actual, later_view(*draw()))
    assert report.counts["two_sines"] == 1, report


def later_gate(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    first = a.sin() + 1
    return first, (b @ b.T @ a).sigmoid().sin()


def test_what_is_computed_late_is_put_before_what_reads_the_first_value() -> None:
    """Inductor puts a gate and its projection right before their first reader."""
    actual, report = run(later_gate, *draw())
    torch.testing.assert_close(actual, later_gate(*draw()))
    assert report.counts["two_sines"] == 1, report


def test_random_numbers_are_drawn_in_their_order() -> None:
    def f(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first = a.sin() + torch.rand_like(a)
        return first, torch.rand_like(b).sin()

    graph = trace(f, *draw(), decompose=False).graph
    site = sites(graph)
    with pytest.raises(Refusal, match="before rand_like_1 is computed"):
        rewrite.replace(graph, site.outputs, site.leaves.values(), list, [], {})


def test_half_of_a_model_is_not_put_elsewhere() -> None:
    def f(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first = a.sin() + 1
        for _ in range(rewrite.MOST_MOVED // 2):
            b = (b * 2).tanh()
        return first, b.exp().sin()

    _, report = run(f, *draw())
    (record,) = report.records
    assert record.outcome == "refused" and "is needed by" in record.reason


@pytest.mark.parametrize("function", [later_view, later_gate])
def test_all_stay_where_they_are_when_the_site_is_left_alone(function: Callable[..., Any]) -> None:
    untouched, _ = graph_after(function, "none")
    text, report = graph_after(function, "two_sines", replace=too_few)
    assert text == untouched and report.records[0].outcome == "refused"


@pytest.mark.parametrize("write", [aten.mul_.Tensor, torch.ops.higher_order.triton_kernel_wrapper_mutation])
def test_views_are_not_moved_over_a_write(write: Any) -> None:
    graph = trace(later_view, *draw(), decompose=False).graph
    site = sites(graph)
    order = [node.name for node in graph.nodes]
    (reader,) = site.replaced.users
    with graph.inserting_after(reader):
        writer = graph.call_function(write, (reader.all_input_nodes[0], 2))
    with pytest.raises(Refusal, match="before slice_1 is computed"):
        rewrite.replace(graph, site.outputs, site.leaves.values(), list, [], {})
    assert [node.name for node in graph.nodes if node is not writer] == order


def graph_after(f: Callable[..., Any], fusions: str, **stages: Any) -> tuple[str, Report]:
    """The graph that the pass leaves, as text."""
    texts: list[str] = []
    explained: FusionPass

    def look(graph: Graph) -> None:
        explained(graph)
        texts.append(str(graph))

    with planted(**stages):
        explained = FusionPass(snapshot({"reference_on_cpu": True, "fusions": fusions}))
        torch._dynamo.reset()
        torch.compile(f, backend=tracing_backend(look))(*draw())  # type: ignore[arg-type]
    return texts[0], Report(tuple(explained.found))


def broken_shape(site: Site, graph: Graph) -> list[Node]:
    first, second = replace(site, graph)
    return [first, rewrite.call(graph, aten.permute.default, second, [1, 0])]


def too_few(site: Site, graph: Graph) -> list[Node]:
    return replace(site, graph)[:1]


def out_of_order(site: Site, graph: Graph) -> list[Node]:
    first, second = replace(site, graph)
    (user,) = site.also[0].users
    return [first, rewrite.call(graph, aten.mul.Tensor, second, user)]


@pytest.mark.parametrize(
    "stage, words",
    [
        (broken_shape, "not provably the graph's"),
        (too_few, "returned 1 values for 2 outputs"),
        (out_of_order, "computed only later"),
    ],
)
def test_one_wrong_value_leaves_the_graph_as_it_was(stage: Any, words: str) -> None:
    def f(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.sin() + 1, b.sin() * 2

    untouched, _ = graph_after(f, "none")
    text, report = graph_after(f, "two_sines", replace=stage)
    assert text == untouched and "sin" in text
    (record,) = report.records
    assert record.outcome == "refused" and words in record.reason, record


def test_verify_looks_at_every_value() -> None:
    def slightly_off(site: Site, graph: Graph) -> list[Node]:
        a, b = site.leaves.values()
        return [rewrite.call(graph, aten.cos.default, _turned(graph, leaf, by)) for leaf, by in ((a, 1.5708), (b, 1.5))]

    def f(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.sin() + 1, b.sin() * 2

    for stage, fused in ((replace, 1), (slightly_off, 0)):
        _, report = run(f, *draw(), stages={"replace": stage}, verify=True)
        assert report.counts["two_sines"] == fused
    assert "verify: the fused op differs" in report.refusals[0].reason


def sites(graph: Graph) -> Site:
    first, second = (n for n in graph.nodes if n.target is aten.sin.default)
    leaves = {"a": first.all_input_nodes[0], "b": second.all_input_nodes[0]}
    return Site(first, first, leaves, {first, second}, also=(second,))


def test_writes_between_the_first_and_the_last_value_are_seen() -> None:
    graph = trace(lambda a, b: (a.sin(), b.sin() * 2), *draw(), decompose=False).graph
    site = sites(graph)
    context = Context(graph, snapshot(), [])
    assert guards.mutations(site, context) is None
    with graph.inserting_after(site.replaced):
        graph.call_function(aten.mul_.Tensor, (site.leaves["b"], 2))
    assert "b is written by mul__tensor" in str(guards.mutations(site, context))


def test_devices_of_every_value_are_compared() -> None:
    site = sites(trace(lambda a, b: (a.sin(), b.sin() * 2), *draw(), decompose=False).graph)
    assert guards.devices(site) is None
    site.also[0].meta["val"] = torch.empty(3, 4, device="meta")
    assert "different devices" in str(guards.devices(site))
