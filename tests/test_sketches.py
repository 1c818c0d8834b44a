"""What is drawn of a graph: words, folds that keep a drawing readable, constants, and what a rewrite leaves."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

from fusion_passes import folding, sketches
from fusion_passes.fusion import Because, NearMiss, Site
from fusion_passes.sizes import assignments
from fusion_passes.sketches import Sketch
from tests.tracing import placeholders, result, trace

aten = torch.ops.aten


def of_function(function: Callable[..., Tensor], *inputs: Tensor) -> Sketch:
    module = trace(function, *inputs)
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    names = {node: f"leaf{i}" for i, node in enumerate(placeholders(module.graph))}
    return sketches.sketch(calls, [result(module)], names)


def titles(sketch: Sketch, *kinds: str) -> list[str]:
    return [box.title for box in sketch.boxes if box.kind in (kinds or ("step", "fold", "fused"))]


def acyclic(sketch: Sketch) -> bool:
    """Can the boxes be put in an order in which all is known that is read?"""
    left = set(range(len(sketch.boxes)))
    while left:
        free = {i for i in left if not any(reader == i and source in left for source, reader in sketch.edges)}
        if not free:
            return False
        left -= free
    return True


def test_operators_in_words() -> None:
    def f(x: Tensor) -> Tensor:
        return (x.to(torch.float32) * 0.25 > 3) & (x.exp() < x).unsqueeze(0)

    sketch = of_function(f, torch.ones(2, 3).half())
    assert titles(sketch) == [
        "cast to float32", "multiply by 0.25", "is greater than 3", "exponential", "is less than", "new axis", "and",
    ]  # fmt: skip
    assert [box.lines for box in sketch.boxes if box.kind == "input"] == [("2 × 3", "float16")]
    assert [box.title for box in sketch.boxes if box.kind == "input"] == ["leaf0"]
    assert (sketch.operators, sketch.views) == (6, 1)


def test_an_operator_without_a_word_keeps_its_name() -> None:
    assert titles(of_function(torch.lgamma, torch.ones(2))) == ["lgamma"]


def test_constants_are_one_box_and_numbers_none() -> None:
    def f(x: Tensor) -> Tensor:
        mask = torch.arange(4)[:, None] >= torch.arange(4)
        return torch.where(mask, x, torch.full((), 2.0))

    sketch = of_function(f, torch.ones(4, 4))
    assert titles(sketch) == ["choose by mask"] and titles(sketch, "constant") == ["from constants"]


def test_a_loop_is_one_box_that_says_what_a_step_is() -> None:
    def f(x: Tensor) -> Tensor:
        for i in range(63):
            x = torch.sin(x * x[i : i + 1]) + x
        return x.exp()

    sketch = of_function(f, torch.ones(64, 2))
    (loop,) = [box for box in sketch.boxes if box.kind == "fold"]
    assert loop.title == "repeated 63 times" and loop.lines == ("multiply → sin → add",)
    assert "63 × sin" in loop.tip
    assert titles(sketch) == ["repeated 63 times", "exponential"] and sketch.operators == 63 * 3 + 1
    assert sketch.views == 63 and acyclic(sketch)


def test_operators_in_a_row_are_one_box() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        functions = (torch.exp, torch.sin, torch.cos, torch.tanh, torch.neg, torch.sigmoid, torch.sqrt, torch.abs)
        a, b = x, y
        for i, function in enumerate(functions + functions[::-1]):
            a, b = function(a), (b + i).relu() if i < 4 else b
        return a * b

    sketch = of_function(f, torch.ones(2), torch.ones(2))
    assert titles(sketch)[0].endswith("operators in a row") and titles(sketch)[-1] == "multiply"
    assert len(sketch.boxes) < folding.MOST and acyclic(sketch)


@pytest.mark.parametrize("count", [60, 600])
def test_whatever_the_graph_few_boxes_are_left_and_none_is_lost(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    draws = torch.randint(0, 1 << 20, (count, 3), generator=generator).tolist()
    functions = (torch.add, torch.mul, torch.maximum, torch.matmul, lambda a, b: a.t(), lambda a, b: a.exp())

    def f(x: Tensor, y: Tensor) -> Tensor:
        known = [x, y]
        for kind, i, j in draws:
            a, b = known[-1 - i % min(len(known), 4)], known[-1 - j % min(len(known), 9)]
            known.append(functions[kind % len(functions)](a, b))
        return sum(known[-8:], start=x)

    sketch = of_function(f, torch.ones(4, 4), torch.ones(4, 4))
    assert len(sketch.boxes) <= folding.MOST + 6 and acyclic(sketch)
    assert all(any(i in edge for edge in sketch.edges) for i in range(len(sketch.boxes)))
    folded = [int(number) for box in sketch.boxes for number in re.findall(r"(\d+) × [a-z]", box.tip)]
    assert sketch.operators == sum(folded) + len(titles(sketch, "step"))


def scaled_site() -> tuple[Site, Graph]:
    """A scaled product of two inputs, which ends before the last operators of the graph."""
    module = trace(lambda x, y: (torch.relu(x @ y).t() * 2).t() + 1, torch.ones(4, 8), torch.ones(8, 4))
    graph = module.graph
    x, y = placeholders(graph)
    (scaled,) = graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    interior = {n for n in graph.nodes if n.op == "call_function" and n < scaled} | {scaled}
    return Site(scaled, scaled, {"x": x, "y": y}, interior), graph


def test_a_site_is_drawn_from_leaves_to_results_with_what_it_holds() -> None:
    site, graph = scaled_site()
    picture = sketches.of_site(site, assignments(graph)[0])
    assert titles(picture.before, "input") == ["x", "y"] and titles(picture.before, "result") == ["result"]
    assert titles(picture.before) == ["matrix product", "relu", "reorder axes", "multiply by 2"]
    assert picture.held == 4 * 4 * 4 and picture.after is None


def test_after_a_rewrite_the_new_nodes_are_drawn() -> None:
    site, graph = scaled_site()
    picture, before = sketches.of_site(site, assignments(graph)[0]), set(graph.nodes)
    with graph.inserting_before(site.replaced):
        product = graph.call_function(aten.mm.default, (site.leaves["x"], site.leaves["y"]))
        product.meta["val"] = site.replaced.meta["val"]
    site.replaced.replace_all_uses_with(product)
    after = sketches.rewritten(picture, site, graph, before).after
    assert after is not None and titles(after) == ["matrix product"] and titles(after, "input") == ["x", "y"]


def test_a_site_that_only_went_away_leads_from_leaf_to_result() -> None:
    site, graph = scaled_site()
    picture = sketches.of_site(site, assignments(graph)[0])
    del site.leaves["y"]
    after = sketches.rewritten(picture, site, graph, set(graph.nodes)).after
    assert after is not None and [box.kind for box in after.boxes] == ["input", "result"] and after.edges == ((0, 1),)


def test_around_an_anchor_even_one_of_constants() -> None:
    graph = trace(lambda x: x + torch.arange(8).cumsum(0), torch.ones(8)).graph
    (anchor,) = graph.find_nodes(op="call_function", target=aten.cumsum.default)
    assert titles(sketches.around(anchor).before)[-1] == "cumulative sum"


def test_sketches_hold_text_alone() -> None:
    site, graph = scaled_site()
    picture = sketches.of_site(site, assignments(graph)[0])
    assert hash(picture) == hash(sketches.of_site(site, assignments(graph)[0]))
    assert not any(isinstance(value, Node) for box in picture.before.boxes for value in vars(box).values())


def test_a_reason_with_a_hint_is_a_reason() -> None:
    reason = Because("too wide", "make it narrow")
    assert reason == "too wide" and f"{reason}" == "too wide" and reason.hint == "make it narrow"
    assert str(NearMiss(reason)) == "too wide" and Because("too wide").hint == ""
