"""Matrix products padded as by Inductor: sites are found all the same, and other graphs are left as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

import fusion_passes
from fusion_passes.graph_pass import FusionPass
from fusion_passes.padded_products import unpadded
from fusion_passes.settings import snapshot
from fusion_passes.testing import assert_fuses, assert_refuses, assert_same
from tests import tracing
from tests.support.padding import gate, padded, scores

aten = torch.ops.aten
ON_CPU: dict[str, Any] = {"reference_on_cpu": True, "strict": True}
PAD = aten.constant_pad_nd.default


def numbers(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def for_gate(tokens: int = 11) -> list[Tensor]:
    return numbers((tokens, 256), (8, 256))


def for_scores() -> list[Tensor]:
    return numbers((6, 12, 16), (11, 16), (6, 12))


def listed(graph: Graph) -> list[tuple[Any, ...]]:
    """Everything about a graph that the pass might change."""
    return [
        (n, n.name, n.op, n.target, n.args, dict(n.kwargs), {k: id(v) for k, v in n.meta.items()}, list(n.users))
        for n in graph.nodes
    ]


def count(graph: Graph, target: Any) -> int:
    return len(graph.find_nodes(op="call_function", target=target))


def fused(graph: Graph) -> list[str]:
    return [n.target._opname for n in graph.nodes if getattr(n.target, "namespace", "") == "fusion_passes"]


def rewritten(function: Callable[..., Any], *inputs: Tensor, **own: Any) -> GraphModule:
    """The graph after the pass; it gives what the function gives."""
    module = tracing.trace(function, *inputs, decompose=False)
    FusionPass(snapshot({**ON_CPU, **own}))(module.graph)
    module.graph.lint()
    module.recompile()
    assert_same(module(*inputs), function(*inputs), 1e-4, 1e-4)
    assert "fusion_passes_unpadded" not in str(module.graph)
    return module


# --- found -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("tokens", [10, 11, 1027])
def test_head_gate(tokens: int, verify: bool) -> None:
    report = assert_fuses(gate, *for_gate(tokens), fusion="head_gate", verify=verify)
    assert report.fused[0].source.rpartition(":")[0].endswith("padding.py") and report.fused[0].node == "mm"


def test_index_score() -> None:
    report = assert_fuses(lambda *x: scores(*x).topk(3).values, *for_scores(), fusion="index_score", verify=True)
    assert "12 heads of 16 channels" in report.fused[0].reason


def test_nothing_of_an_absorbed_product_remains() -> None:
    graph = rewritten(lambda *x: scores(*x).topk(3).values, *for_scores()).graph
    assert fused(graph) == ["index_score"]
    assert not count(graph, PAD) and not count(graph, aten.bmm.default) and not count(graph, aten.slice.Tensor)


def test_of_two_padded_products_the_other_stays_padded() -> None:
    def both(x: Tensor, weight: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return gate(x, weight), padded(x, other).sin()

    graph = rewritten(both, *for_gate(), *numbers((256, 300))).graph
    assert fused(graph) == ["head_gate"] and count(graph, PAD) == 2 and count(graph, aten.mm.default) == 1
    (product,) = graph.find_nodes(op="call_function", target=aten.mm.default)
    assert list(product.meta["val"].shape) == [16, 304] and product.name == "mm_1"


def test_a_padded_product_that_a_fused_op_reads_keeps_padding_and_strides() -> None:
    def function(x: Tensor, weight: Tensor) -> list[Tensor]:
        pieces = padded(x, weight).split([8, 8, 16, 5], dim=-1)[:3]
        return [aten.clone.default(piece, memory_format=torch.contiguous_format) for piece in pieces]

    graph = rewritten(function, *numbers((9, 16), (16, 37)), always_profitable=True).graph
    (call,) = (n for n in graph.nodes if getattr(n.target, "namespace", "") == "fusion_passes")
    assert call.target._opname == "qkv_split" and count(graph, aten.mm.default) == 1 and count(graph, PAD) == 2
    assert call.all_input_nodes[0].meta["val"].stride()[-2] == 40


def test_in_a_branch_and_in_an_exported_program() -> None:
    def both(chosen: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return torch.cond(chosen > 0, lambda *a: gate(*a) * 1.0, lambda *a: gate(*a).sin(), (x * 1, weight * 1))

    inputs = for_gate()
    with torch.no_grad():
        assert_fuses(both, torch.tensor(1.0), *inputs, fusion="head_gate", count=2)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # Both kinds of result that have to keep their names: sliced, and with only the contracted axis padded.
            return gate(x, weight), padded(x.t(), x), padded(x[:8, :11], x.t()[:11, :8])

    with torch.no_grad():
        program = torch.export.export(Model(), tuple(inputs))
        done = fusion_passes.apply(program, **ON_CPU)
    assert fused(done.graph) == ["head_gate"] and count(done.graph, aten.mm.default) == 2
    names = [spec.arg.name for spec in done.graph_signature.output_specs]
    assert names[1:] == [n.name for n in done.graph.output_node().args[0]][1:] and "mm_2" in names
    assert_same(done.module()(*inputs), program.module()(*inputs))


def test_reports_do_not_mention_what_stands_in() -> None:
    def best(*given: Tensor) -> Tensor:
        return scores(*given).topk(3).indices

    for function, inputs in ((gate, for_gate()), (best, for_scores()), (padded, numbers((9, 11), (11, 13)))):
        with torch.no_grad():
            report = fusion_passes.explain(function, *inputs)
        text = str(report) + report.to_json() + repr(report.drawings)
        assert "fusion_passes_unpadded" not in text and "placeholder" not in text
        assert bool(report.fused) == (function is not padded), report


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_the_scale_may_be_a_lerp(factor: float) -> None:
    """torch 2.11 does not decompose it."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.lerp(torch.zeros(1), padded(x, weight.t()), factor)

    graph = rewritten(function, *for_gate()).graph
    assert fused(graph) == ["head_gate"] and not count(graph, aten.lerp.Scalar)


# --- strides ---------------------------------------------------------------------------------------------------------


def test_a_result_without_the_gaps_of_the_padding() -> None:
    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        found = scores(*given)
        return found.view(2, 3, 11).cumsum(-1), found.sin()

    graph = rewritten(function, *for_scores()).graph
    (view,) = graph.find_nodes(op="call_function", target=aten.view.default)
    assert fused(graph) == ["index_score"] and view.meta["val"].stride() == (33, 11, 1)


def test_strides_that_a_reader_may_depend_on_stay() -> None:
    def by_address(*given: Tensor) -> Tensor:
        return aten.as_strided.default(scores(*given), [6, 11], [16, 1])

    assert_refuses(by_address, *for_scores(), fusion="index_score", reason="as_strided")
    graph = rewritten(scores, *for_scores()).graph  # a result, whose strides nothing restores here
    assert fused(graph) == [] and count(graph, PAD) == 4


# --- left alone ------------------------------------------------------------------------------------------------------


def cut(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A product of two matrices that are padded with a row or column more, and what becomes of it."""

    def whole(a: Tensor, b: Tensor) -> Tensor:
        product = aten.mm.default(PAD(a, [0, 1, 0, 1]), PAD(b, [0, 1, 0, 1]))
        return function(product, b).sin()

    return whole


OTHERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "padded_with_ones": lambda a, b: aten.mm.default(PAD(a, [0, 0, 0, 1], 1.0), b)[:-1].sin(),
    "contracted_axis_of_ones": lambda a, b: aten.mm.default(PAD(a, [0, 1], 1.0), PAD(b, [0, 0, 0, 1])).sin(),
    "padded_in_front": lambda a, b: aten.mm.default(PAD(a, [0, 0, 1, 0]), b)[:-1].sin(),
    "negative_pad": lambda a, b: aten.mm.default(PAD(a, [0, -1, 0, 0]), PAD(b, [0, 0, 0, -1])).sin(),
    "contracted_axis_of_one_side": lambda a, b: aten.mm.default(PAD(a[:, :-1], [0, 1]), b).sin(),
    "batches_padded": lambda a, b: aten.slice.Tensor(
        aten.bmm.default(PAD(a[None], [0, 0, 0, 0, 0, 1]), b.expand(2, -1, -1)), 0, 0, -1
    ).sin(),
    "pad_needed_elsewhere": lambda a, b: (lambda p: (aten.mm.default(p, b)[:-1].sin(), p))(PAD(a, [0, 0, 0, 1])),
    "bias": lambda a, b: aten.addmm.default(b[:1], PAD(a, [0, 0, 0, 1]), b)[:-1].sin(),
    "not_cut": cut(lambda p, b: p),
    "cut_in_one_axis_only": cut(lambda p, b: p[:-1]),
    "too_little_cut": cut(lambda p, b: aten.slice.Tensor(PAD(p, [0, 1]), 1, 0, -1)),
    "too_much_cut": cut(lambda p, b: p[:-2, :-1]),
    "first_row_cut": cut(lambda p, b: aten.slice.Tensor(p[1:], 1, 0, -1)),
    "every_second_row": lambda a, b: aten.slice.Tensor(aten.mm.default(PAD(a, [0, 0, 0, 5]), b), 0, 0, 10, 2).sin(),
    "uncut_product_needed_elsewhere": cut(lambda p, b: p[:-1, :-1] + p.sum()),
    "half_cut_product_needed_elsewhere": cut(lambda p, b: (lambda h: h[:, :-1] + h.sum())(p[:-1])),
}

# Padded products in graphs without a site.
PLAIN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "rows": lambda a, b: aten.mm.default(PAD(a, [0, 0, 0, 1]), b)[:-1].sin(),
    "columns": lambda a, b: (a.sum(), aten.mm.default(a, PAD(b, [0, 1]))[:, :-1] * a.sum(), b.sum()),
    "all_axes": lambda a, b: (padded(a, b) + padded(a.sin(), b)) * padded(a, b).sum(),
    "contracted_axis": lambda a, b: (lambda p: (b.sum(), p.exp(), p, a.cos()))(
        aten.mm.default(PAD(a, [0, 1]), PAD(b, [0, 0, 0, 1]))
    ),
    "one_reads_the_other": lambda a, b: padded(padded(a, b), b.t()).relu(),
    "contracted_axes_in_a_row": lambda a, b: aten.mm.default(
        PAD(aten.mm.default(PAD(a, [0, 1]), PAD(b, [0, 0, 0, 1])), [0, 1]), PAD(b.t(), [0, 0, 0, 1])
    ).relu(),
    "batches": lambda a, b: padded(a.expand(3, -1, -1), b.expand(3, -1, -1)).sum(0),
    "a_matrix_and_itself": lambda a, b: padded(a.mT @ a, a.mT @ a).relu(),
    "one_pad_for_both": lambda a, b: (lambda p: aten.mm.default(p, p)[:-1, :-1].relu())(PAD(a.mT @ a, [0, 1, 0, 1])),
}


@pytest.mark.parametrize("name", [*OTHERS, *PLAIN])
def test_a_graph_without_a_site_is_untouched(name: str) -> None:
    module = tracing.trace((OTHERS | PLAIN)[name], *numbers((5, 11), (11, 7)), decompose=False)
    before = listed(module.graph)
    with unpadded(module.graph) as aside:
        assert bool(aside.results) == (name in PLAIN)
        module.graph.lint()
    assert listed(module.graph) == before
    FusionPass(snapshot(ON_CPU))(module.graph)
    assert listed(module.graph) == before


def test_inside_there_are_plain_products() -> None:
    module = tracing.trace(PLAIN["one_reads_the_other"], *numbers((5, 11), (11, 7)), decompose=False)
    with unpadded(module.graph) as aside:
        products = [n for n in module.graph.nodes if n.target is aten.mm.default and n not in aside.nodes]
        assert [n.name for n in products] == ["mm", "mm_1"] and products[1].args[0] is products[0]
        assert [n.target for n in products[0].all_input_nodes] == ["a_1", "b_1"]
        assert products[0].meta["val"].stride() == (8, 1) and not set(products[0].users) & aside.nodes


@pytest.mark.parametrize("strict", [False, True])
def test_a_failure_leaves_the_graph_as_it_was(strict: bool) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("planted")

    module = tracing.trace(gate, *for_gate(), decompose=False)
    before = listed(module.graph)
    with mock.patch.object(FusionPass, "_attempt" if strict else "_search", broken):
        run = FusionPass(snapshot({**ON_CPU, "strict": strict}))
        if strict:
            with pytest.raises(ZeroDivisionError):
                run(module.graph)
        else:
            run(module.graph)
    assert listed(module.graph) == before


def test_an_operand_that_a_fused_op_computes_later() -> None:
    module = tracing.trace(PLAIN["all_axes"], *numbers((5, 11), (11, 7)), decompose=False)
    with unpadded(module.graph) as aside:
        product = next(n for n in module.graph.nodes if n.target is aten.mm.default and n not in aside.nodes)
        with module.graph.inserting_before(product):
            later = module.graph.call_function(aten.neg.default, (product.args[0],))
        later.meta["val"] = product.args[0].meta["val"]
        product.replace_input_with(product.args[0], later)
    module.graph.lint()
    (pad,) = later.users
    assert pad.target is PAD and pad.name == "constant_pad_nd"


def test_a_fusion_that_cleans_up_by_itself() -> None:
    """What is set aside looks dead. A fusion of somebody else may erase it: then plain products remain."""
    inputs = numbers((5, 11), (11, 7))
    module = tracing.trace(PLAIN["all_axes"], *inputs, decompose=False)
    expected = module(*inputs)
    with unpadded(module.graph):
        module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    assert_same(module(*inputs), expected)
    assert not count(module.graph, PAD)
    assert "fusion_passes" not in str([(n, n.target, n.meta) for n in module.graph.nodes])
