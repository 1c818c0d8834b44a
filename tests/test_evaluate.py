"""The lazy evaluator: dtypes, cost, refusals, leaves, and graphs like those of models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from fusion_passes.evaluate import Evaluator, constant, hashed
from fusion_passes.sizes import Sizes, Unsupported, assignments
from tests import tracing
from tests.tracing import draw

aten = torch.ops.aten


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_rounds_and_saturates(dtype: torch.dtype) -> None:
    x = torch.tensor([0.1, -0.33, 447.0, 1e6, -1e9, float("inf"), float("-inf"), 0.0])
    limit = torch.finfo(dtype).max
    expected = x.clamp(-limit, limit).to(dtype).double()
    module = tracing.trace(lambda x: x.to(dtype).float() * 2, x)
    values = tracing.evaluate_all(tracing.result(module), tracing.tables(module.graph, [x]), Sizes())
    assert torch.equal(values, 2 * expected)


def test_float8_casts_can_be_looked_through() -> None:
    x = torch.tensor([0.1, -0.33, 1e6, float("-inf")])
    module = tracing.trace(lambda x: x.to(torch.float8_e4m3fn), x)
    evaluator = Evaluator(tracing.tables(module.graph, [x.double()]), Sizes(), round_float8=False)
    assert torch.equal(evaluator.values(tracing.result(module), torch.arange(4)), x.double())
    assert not evaluator.roundings


def test_casts_are_identities_and_narrowing_ones_are_reported() -> None:
    def function(x: Tensor) -> Tensor:
        half = (x * 3).to(torch.bfloat16)
        return half.float().sin().double() + half.double() + x.to(torch.float64)

    module = tracing.trace(function, draw(5))
    x = draw(5).double()
    evaluator = Evaluator(tracing.tables(module.graph, [x]), Sizes())
    tracing.compare(evaluator.values(tracing.result(module), torch.arange(5)), (x * 3).sin() + x * 3 + x)
    assert [n.meta["val"].dtype for n in evaluator.roundings] == [torch.bfloat16]


def test_copying_into_a_narrow_buffer_is_a_rounding() -> None:
    def function(x: Tensor) -> Tensor:
        out = torch.empty(5, dtype=torch.float16)
        out[:] = x
        return out

    module = tracing.trace(function, draw(5))
    evaluator = Evaluator(tracing.tables(module.graph, [draw(5).double()]), Sizes())
    assert torch.equal(evaluator.values(tracing.result(module), torch.arange(5)), draw(5).double())
    assert len(evaluator.roundings) == 1


def test_casts_to_integers_and_bools() -> None:
    x = torch.tensor([-1.7, -0.2, 0.0, 0.9, 300.5])
    module = tracing.trace(lambda x: (x.int(), x.bool(), x.int().to(torch.uint8), x.to(torch.bool).to(torch.int32)), x)
    wide = [x.double()]
    expected = [[-1, 0, 0, 0, 300], [True, True, False, True, True], [255, 0, 0, 0, 44], [1, 1, 0, 1, 1]]
    for i, want in enumerate(expected):
        values = tracing.evaluate_all(tracing.result(module, i), tracing.tables(module.graph, wide), Sizes())
        assert values.tolist() == want


def test_uninitialised_memory_is_poison() -> None:
    def function(x: Tensor) -> Tensor:
        out = x.new_empty(6)
        out[:4] = x
        return out

    module = tracing.trace(function, draw(4))
    values = tracing.evaluate_all(tracing.result(module), tracing.tables(module.graph, [draw(4)]), Sizes())
    assert torch.equal(values[:4], draw(4).double()) and values[4:].isnan().all()


# ---------------------------------------------------------------- cost


class Counting(Evaluator):
    """Counts how often a node is visited, and refuses to compute an element twice."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.visits = 0
        self.done: dict[Node, Tensor] = {}

    def _compute(self, node: Node, index: Tensor) -> Any:
        self.visits += 1
        done = self.done.setdefault(node, torch.zeros(self.sizes.numel(node), dtype=torch.bool))
        assert not done[index].any(), f"{node} twice"
        done[index] = True
        return (yield from super()._compute(node, index))


def substitution(a: Tensor) -> Tensor:
    """Inverse of I - tril(a, -1) by forward substitution, row by row."""
    size = a.shape[-1]
    a = a.tril(-1).clone()
    for i in range(1, size):
        row, above = a[..., i, :i].clone(), a[..., :i, :i].clone()
        a[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    return a + torch.eye(size, dtype=a.dtype)


def traced_loop(size: int) -> tuple[GraphModule, Node]:
    module = tracing.trace(lambda a: substitution(a), torch.zeros(1, 2, 3, size, size))
    return module, tracing.result(module)


def test_an_unrolled_loop_is_evaluated_once() -> None:
    visits = {}
    for size in (16, 64):
        module, node = traced_loop(size)
        a = draw(1, 2, 3, size, size, low=-0.3, high=0.3).double()
        evaluator = Counting(tracing.tables(module.graph, [a]), Sizes())
        index = size * size + torch.tensor([3 * size + 1, size * size - 2, 9 * size + 7])
        values = evaluator.values(node, index)
        eye = torch.eye(size, dtype=torch.float64)
        tracing.compare(values, torch.linalg.inv(eye - a.tril(-1)).reshape(-1)[index])
        nodes = sum(n.op == "call_function" for n in module.graph.nodes)
        visits[size] = evaluator.visits
        assert evaluator.visits < 2 * nodes
        # two neighbours of six matrices are evaluated
        assert evaluator.computed < 6 * size**3
    assert visits[64] < 5 * visits[16]


def test_promotion_goes_no_further_than_the_next_chunk() -> None:
    module, node = traced_loop(16)
    evaluator = Counting({tracing.placeholders(module.graph)[0]: hashed(0, -0.3, 0.3)}, Sizes())
    evaluator.values(node, torch.tensor([16 * 16 * 4 + 35]))
    for known, done in evaluator.done.items():
        if known.target is aten.select_scatter.default and len(known.meta["val"].shape) == 5:
            assert (done.nonzero() // 256).unique().tolist() == [4, 5]


def test_an_assembly_of_chunks_is_not_evaluated_whole() -> None:
    def function(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(8):
            out[:, i] = x[:, i].sin() * i
        return out

    module = tracing.trace(function, torch.zeros(2, 8, 16, 16))
    (leaf,) = tracing.placeholders(module.graph)
    evaluator = Evaluator({leaf: hashed(0, -1, 1)}, Sizes())
    index = 256 * torch.arange(16) + 7
    values = evaluator.values(tracing.result(module), index)
    tracing.compare(values, hashed(0, -1, 1)(index).sin() * (torch.arange(16) % 8))
    assert evaluator.computed < 250


def test_long_chains_do_not_recurse() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(1500):
            x = x + 1
        return x

    module = tracing.trace(function, draw(3))
    values = Evaluator(tracing.tables(module.graph, [draw(3)]), Sizes()).values(tracing.result(module), torch.arange(3))
    assert torch.allclose(values, draw(3).double() + 1500)


def test_elements_are_computed_once_over_several_calls() -> None:
    module = tracing.trace(lambda x: (x.sin() + x.sin().cumsum(0)).exp(), draw(50))
    (x,) = tracing.placeholders(module.graph)
    evaluator = Counting({x: hashed(3, -1, 1)}, Sizes())
    first = evaluator.values(tracing.result(module), torch.tensor([40, 3, 3, 7]))
    work = evaluator.computed
    again = evaluator.values(tracing.result(module), torch.tensor([[3, 40], [7, 7]]))
    assert evaluator.computed == work
    assert torch.equal(again, first[torch.tensor([[1, 0], [3, 3]])])


def test_where_does_not_evaluate_what_it_does_not_select() -> None:
    module = tracing.trace(lambda x, y: torch.where(torch.arange(8) < 8, x, y.topk(8)[0]), draw(8), draw(8))
    x, _ = tracing.placeholders(module.graph)
    values = Evaluator({x: hashed(1, 0, 1)}, Sizes()).values(tracing.result(module), torch.arange(8))
    assert torch.equal(values, hashed(1, 0, 1)(torch.arange(8)))


def test_sampling_a_large_tensor_is_cheap() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y).relu().transpose(1, 2).reshape(64, -1)

    with FakeTensorMode():
        x, y = torch.empty(64, 2048, 128), torch.empty(64, 128, 4096)
        module = tracing.trace(function, x, y)
    leaves = {n: hashed(i, -1, 1) for i, n in enumerate(tracing.placeholders(module.graph))}
    evaluator = Evaluator(leaves, Sizes())
    index = torch.randint(64 * 2048 * 4096, (100,))
    assert evaluator.values(tracing.result(module), index).shape == (100,)
    assert evaluator.computed < 200_000


# ---------------------------------------------------------------- refusals


def test_refusals_name_what_is_not_known() -> None:
    module = tracing.trace(lambda x: (x.topk(2)[0], torch.fft.fft(x).real, x.sort().values), draw(8))
    leaves = tracing.tables(module.graph, [draw(8)])
    for i, name in enumerate(("topk", "view_as_real", "sort")):
        with pytest.raises(Unsupported, match=name):
            Evaluator(leaves, Sizes()).values(tracing.result(module, i), torch.arange(2))
    with pytest.raises(Unsupported, match="is an input without values"):
        Evaluator({}, Sizes()).values(tracing.placeholders(module.graph)[0], torch.arange(2))


def test_the_budget_is_kept() -> None:
    module = tracing.trace(lambda x: (x.sin().sum(), x.sin().cos().exp()), draw(50))
    leaves = tracing.tables(module.graph, [draw(50)])
    with pytest.raises(Unsupported, match="more than 40 elements"):
        Evaluator(leaves, Sizes(), budget=40).values(tracing.result(module, 0), torch.tensor([0]))
    with pytest.raises(Unsupported, match="more than 100 elements"):
        Evaluator(leaves, Sizes(), budget=100).values(tracing.result(module, 1), torch.arange(50))
    Evaluator(leaves, Sizes(), budget=150).values(tracing.result(module, 1), torch.arange(50))


# ---------------------------------------------------------------- graphs like those of models


def gate(z: Tensor, a_log: Tensor, bias: Tensor, chunk: int) -> Tensor:
    """The chunk-local sum of a softplus gate: [B, T, H, K] -> [B, H, N, C, K]."""
    z = z.float() + bias.float().reshape(1, 1, -1, z.shape[-1])
    g = -a_log.float().exp()[:, None] * torch.where(z > 20.0, z, torch.log(torch.exp(z) + 1.0))
    g = g.permute(0, 2, 1, 3).contiguous()
    g = F.pad(g, (0, 0, 0, -g.shape[2] % chunk))
    return g.reshape(*g.shape[:2], -1, chunk, g.shape[-1]).cumsum(-2)


@pytest.mark.parametrize("symbolic", [False, True])
def test_gate(symbolic: bool) -> None:
    shapes = [(2, 11, 3, 5), (3,), (15,)]
    inputs = [draw(*s, low=-30, high=30, seed=i) for i, s in enumerate(shapes)]
    inputs = [inputs[0].bfloat16(), inputs[1] / 10, inputs[2].bfloat16()]
    module = tracing.trace(lambda z, a, b: gate(z, a, b, 4), *inputs, symbolic=symbolic)
    found = assignments(module.graph)
    assert len(found) == (3 if symbolic else 1)
    for sizes in found:
        leaves, dense = {}, []
        for i, node in enumerate(tracing.placeholders(module.graph)):
            leaves[node] = hashed(i, -30, 30) if i != 1 else hashed(i, -3, 3)
            count = sizes.numel(node)
            dense.append(leaves[node](torch.arange(count)).reshape(sizes.shape(node)))
        z, a_log, bias = dense
        wide = z + bias.reshape(1, 1, *z.shape[2:])
        # logaddexp is an independent spelling of softplus
        g = -a_log.exp()[:, None] * torch.where(wide > 20, wide, torch.logaddexp(wide, torch.zeros_like(wide)))
        g = F.pad(g.transpose(1, 2), (0, 0, 0, -g.shape[1] % 4))
        expected = g.unflatten(2, (-1, 4)).cumsum(-2)
        actual = tracing.evaluate_all(tracing.result(module), leaves, sizes)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_real_tensors_under_a_fake_mode_and_a_default_device() -> None:
    module = tracing.trace(lambda x: F.pad(x.tril(), (0, 2)).cumsum(0) @ torch.ones(6, 2), draw(4, 4))
    (x,) = tracing.placeholders(module.graph)
    plain = Evaluator({x: hashed(0, -1, 1)}, Sizes()).values(tracing.result(module), torch.arange(8))
    index = torch.arange(8)
    with FakeTensorMode(), torch.device("meta"):
        values = Evaluator({x: hashed(0, -1, 1)}, Sizes()).values(tracing.result(module), index)
    assert type(values) is Tensor and values.device.type == "cpu" and torch.equal(values, plain)


# ---------------------------------------------------------------- leaves and constants


def test_hashed_values_are_uniform_and_independent() -> None:
    index = torch.arange(100_000)
    draws = torch.stack([hashed(seed, -2.0, 4.0)(index) for seed in range(4)])
    assert draws.dtype == torch.float64 and draws.min() >= -2 and draws.max() < 4
    assert torch.equal(draws[1], hashed(1, -2.0, 4.0)(index))
    torch.testing.assert_close(draws.mean(1), torch.ones(4).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(draws.std(1), torch.full((4,), 6 / math.sqrt(12)).double(), atol=0.03, rtol=0)
    both = torch.cat([draws, draws[:, 1:].roll(1, 1)[:, :1].expand(4, 1)], 1)[:, :-1]
    correlations = torch.corrcoef(torch.cat([both, draws.roll(1, 1), draws.roll(64, 1)]))
    assert (correlations - torch.eye(12)).abs().sort().values[:, :8].max() < 0.02
    assert draws[0].unique().numel() == len(index)


def test_special_values_take_an_eighth() -> None:
    values = hashed(5, 0.0, 1.0, special=(100.0, float("-inf")))(torch.arange(80_000))
    for special in (100.0, float("-inf")):
        assert 0.055 < (values == special).double().mean() < 0.07
    assert ((values >= 0) & (values < 1)).double().mean() > 0.86


def _constants(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, bool]]:
    yield torch.arange(4)[:, None] >= torch.arange(4), True
    yield torch.eye(4).tril() @ torch.ones(4, 4), True
    yield torch.zeros_like(x) + x.shape[0], True
    yield torch.ones(4).split(2)[0].cumsum(0), True
    yield torch.where(torch.arange(4) > 2, x[0], 0.0), False
    yield torch.rand(4), False
    yield y.nonzero().new_zeros(3), True
    yield torch.zeros(4) + y.sum().item(), False


@pytest.mark.parametrize("which", range(8))
def test_constants(which: int) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return list(_constants(x, y))[which][0]

    expected = [flag for _, flag in _constants(draw(4, 4), draw(4))][which]
    module = tracing.trace(function, draw(4, 4), draw(4), symbolic=True)
    assert constant(tracing.result(module), assignments(module.graph)[0]) is expected
