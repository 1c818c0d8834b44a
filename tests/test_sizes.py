"""Assignments of integers to size symbols: admissible, different, and without a trace in the ShapeEnv."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fusion_passes.sizes import Sizes, Unsupported, assignments
from tests import tracing


def shape_env(module: GraphModule) -> Any:
    for node in module.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else [value]
        for size in sizes:
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    raise AssertionError("no symbolic size in the graph")


def first_sizes(module: GraphModule, which: int = 0) -> list[tuple[int, ...]]:
    leaf = tracing.placeholders(module.graph)[which]
    return [sizes.shape(leaf) for sizes in assignments(module.graph, count=4)]


def chunks(x: Tensor) -> Tensor:
    assert x.shape[0] % 64 == 0 and x.shape[0] > 100
    return x.reshape(-1, 64, x.shape[1]).cumsum(1) * 2


def padded(x: Tensor) -> Tensor:
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % 64))
    return x.reshape(-1, 64, x.shape[-1]).sum(1)


def specialised_chunks(x: Tensor) -> list[Tensor]:
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % 64)).reshape(-1, 64, x.shape[-1])
    return [x[i] + 1 for i in range(x.shape[0])]


def product(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y).relu()


def grouped(x: Tensor, y: Tensor) -> Tensor:
    assert x.shape[0] % y.shape[0] == 0
    return x.reshape(y.shape[0], -1, x.shape[1]) * y[:, None, None]


def doubled(x: Tensor, y: Tensor) -> Tensor:
    return x.repeat(2, 1) + y


CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], Callable[..., bool]]] = {
    "multiple of 64 and above 100": (chunks, [(256, 5)], lambda x: x[0] % 64 == 0 and x[0] > 100),
    "any length, padded": (padded, [(200, 7)], lambda x: x[0] >= 2),
    "a fixed number of chunks": (specialised_chunks, [(200, 7)], lambda x: 192 < x[0] <= 256),
    "equal sizes of two inputs": (product, [(6, 10), (10, 9)], lambda x, y: x[1] == y[0]),
    "one size a multiple of another": (grouped, [(24, 5), (8,)], lambda x, y: x[0] % y[0] == 0),
    "one size twice another": (doubled, [(6, 10), (12, 10)], lambda x, y: 2 * x[0] == y[0] and x[1] == y[1]),
}


@pytest.mark.parametrize("name", CASES)
def test_assignments_satisfy_the_guards(name: str) -> None:
    function, shapes, holds = CASES[name]
    module = tracing.trace(function, *(torch.zeros(s) for s in shapes), symbolic=True)
    env = shape_env(module)
    before = len(env.guards), len(env.replacements), dict(env.var_to_range)
    found = assignments(module.graph, count=4)
    assert (len(env.guards), len(env.replacements), dict(env.var_to_range)) == before
    inputs = tracing.placeholders(module.graph)
    drawn = [tuple(sizes.shape(node) for node in inputs) for sizes in found]
    assert drawn[0] == tuple(shapes)
    assert len(drawn) == 4 == len(set(drawn))
    for sizes, case in zip(found, drawn):
        assert holds(*case)
        # the traced shapes agree with those of the function run at these sizes
        expected = function(*(torch.zeros(s) for s in case))
        expected = expected if isinstance(expected, list) else [expected]
        assert [sizes.shape(tracing.result(module, i)) for i in range(len(expected))] == [e.shape for e in expected]


def test_alternatives_change_every_symbol_and_are_small() -> None:
    module = tracing.trace(padded, torch.zeros(2000, 300), symbolic=True)
    hint, *others = first_sizes(module)
    assert hint == (2000, 300) and len(others) == 3
    assert all(a != b for other in others for a, b in zip(other, hint))
    assert min(other[0] for other in others) < 500


def test_every_seed_is_reproducible() -> None:
    module = tracing.trace(padded, torch.zeros(200, 30), symbolic=True)
    leaf = tracing.placeholders(module.graph)[0]
    draws = [[s.shape(leaf) for s in assignments(module.graph, seed=seed)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_bounded_size_stays_in_its_bounds() -> None:
    def function(x: Tensor) -> Tensor:
        torch._check(x.shape[0] <= 20)
        torch._check(x.shape[0] >= 15)
        return x + 1

    module = tracing.trace(function, torch.zeros(16, 3), symbolic=True)
    rows = [shape[0] for shape in first_sizes(module)]
    assert len(rows) > 1 and all(15 <= r <= 20 for r in rows)


def test_a_static_graph_has_one_assignment() -> None:
    module = tracing.trace(padded, torch.zeros(100, 3))
    (sizes,) = assignments(module.graph)
    node = tracing.result(module)
    assert sizes.shape(node) == (2, 3) and sizes.numel(node) == 6 and sizes.strides(node) == (3, 1)


def test_only_the_hint_where_nothing_else_is_admissible() -> None:
    def function(x: Tensor) -> Tensor:
        torch._check((x.shape[0] - 17) * (x.shape[0] - 17) < 1)
        return x + 1

    module = tracing.trace(function, torch.zeros(17, 3), symbolic=True)
    rows = {shape[0] for shape in first_sizes(module)}
    assert rows == {17}


def test_strides_and_offsets() -> None:
    module = tracing.trace(lambda x: x[2:].t(), torch.zeros(8, 5), symbolic=True)
    node = tracing.result(module)
    for sizes in assignments(module.graph):
        leaf = tracing.placeholders(module.graph)[0]
        rows, columns = sizes.shape(leaf)
        assert sizes.shape(node) == (columns, rows - 2)
        assert sizes.strides(node) == (1, columns) and sizes.offset(node) == 2 * columns


def test_of_numbers_and_nodes() -> None:
    module = tracing.trace(lambda x: x.reshape(-1, 2) * (x.shape[0] / 4), torch.zeros(8, 6), symbolic=True)
    sizes = assignments(module.graph)[0]
    assert [sizes.of(v) for v in (3, 2.5, True, None)] == [3, 2.5, True, None]
    values = {n.meta["val"]: sizes.of(n) for n in module.graph.nodes if isinstance(n.meta.get("val"), torch.SymFloat)}
    assert list(values.values()) == [2.0] and isinstance(next(iter(values.values())), float)
    symbol = tracing.placeholders(module.graph)[0].meta["val"].shape[0]
    assert sizes.of(symbol) == 8 and type(sizes.of(symbol)) is int
    guards = len(symbol.node.shape_env.guards)
    assert sizes.of(symbol > 100) is False and sizes.of(symbol < 100) is True
    assert len(symbol.node.shape_env.guards) == guards


def test_tensors_are_no_sizes() -> None:
    node = Graph().placeholder("weight")
    with pytest.raises(Unsupported, match="weight has no recorded value"):
        Sizes().of(node)
    node.meta["val"] = torch.zeros(3)
    with pytest.raises(Unsupported, match="weight is a Tensor, not a size"):
        Sizes().of(node)


def test_data_dependent_sizes_are_named() -> None:
    def function(x: Tensor) -> Tensor:
        return x.nonzero() + 1

    module = tracing.trace(function, torch.ones(5, 3), symbolic=True)
    found = assignments(module.graph)
    assert len(found) == 3
    node: Node = tracing.result(module)
    for sizes in found:
        with pytest.raises(Unsupported, match="depends on data .u0 is not known"):
            sizes.shape(node)
