"""Sites that are alike cost one proof, and those that are not are told apart."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_passes.patterns import _head_gate_scaling, gate_cumsum, index_score
from fusion_passes.patterns._likeness import likeness
from fusion_passes.patterns._proofs import Proofs
from fusion_passes.testing import assert_same, run_fused

LAYERS = 24


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often each fusion has evaluated a subgraph, from a process that has proved nothing yet."""
    counts: collections.Counter[str] = collections.Counter()
    proofs = {"head_gate": (_head_gate_scaling, "_scale"), "gate_cumsum": (gate_cumsum, "_found"),
              "index_score": (index_score, "_proven")}  # fmt: skip
    for fusion, (module, name) in proofs.items():
        module.proofs.clear()
        monkeypatch.setattr(module, name, _counting(counts, fusion, getattr(module, name)))
    return counts


def _counting(counts: collections.Counter[str], fusion: str, prove: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*args: Any) -> Any:
        counts[fusion] += 1
        return prove(*args)

    return counting


def products(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(LAYERS):
        x = (torch.relu(x @ w) + 1) * 0.5
    return x


def weights(x: Tensor, w: Tensor) -> list[Tensor]:
    return [(torch.tanh(x + i) @ w) * 0.25 for i in range(LAYERS)]


def gates(x: Tensor, a_log: Tensor) -> Tensor:
    """The factor is that of the layers before as well: where a gate ends, the search for its axes ends too."""
    for _ in range(LAYERS):
        raw = (x @ x.mT @ x).unflatten(1, (-1, 64))
        x = (-a_log.exp() * F.softplus(raw)).cumsum(2).flatten(1, 2) * 1e-3
    return x


def other_sums(x: Tensor, a_log: Tensor) -> Tensor:
    for _ in range(LAYERS):
        raw = (x @ x.mT @ x).unflatten(1, (-1, 64))
        x = torch.tanh((-a_log.exp() * torch.sigmoid(raw) * raw).cumsum(2).flatten(1, 2))
    return x


def scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).triu(1)
    for _ in range(LAYERS):
        scored = (torch.einsum("shd,td->sht", q, k).relu() * w.unsqueeze(-1)).sum(1).masked_fill(hidden, float("-inf"))
        chosen = scored.topk(3).indices
        k = torch.tanh(k @ k.mT @ k) + chosen.sum()
    return k


CASES: dict[str, tuple[str, Callable[..., Any], tuple[Tensor, ...], int]] = {
    "products": ("head_gate", products, (torch.randn(64, 64), torch.randn(64, 64)), 0),
    "weights": ("head_gate", weights, (torch.randn(5, 256), torch.randn(256, 8)), LAYERS),
    "gates": ("gate_cumsum", gates, (torch.randn(2, 128, 8) / 8, torch.rand(8)), LAYERS),
    "other sums": ("gate_cumsum", other_sums, (torch.randn(2, 128, 8) / 8, torch.rand(8)), 0),
    "scores": ("index_score", scores, (torch.randn(6, 8, 16), torch.randn(10, 16), torch.randn(6, 8)), LAYERS),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_layers_cost_one_proof(name: str, counted: collections.Counter[str]) -> None:
    fusion, function, args, sites = CASES[name]
    found, report = run_fused(function, *args, fusions=fusion, always_profitable=sites > 0)
    assert report.counts[fusion] == sites, str(report)
    assert len([r for r in report.records if r.fusion == fusion]) >= LAYERS - 1, str(report)
    assert 1 <= counted[fusion] <= 4, counted  # the first and the last layer may differ from the others
    if sites:
        assert_same(found, function(*args), 1e-4, 1e-4)


def scaled(x: Tensor, w: Tensor, q: Tensor) -> list[Tensor]:
    product = [torch.tanh(x + i) @ w for i in range(6)]
    return [
        product[0] * 0.25,
        product[1] * 0.5,
        product[2] * 0.25 * q,
        product[3] * (0.25 * torch.ones(8)),
        product[4] * torch.where(torch.arange(8) < 7, 0.25, 0.5),
        product[5] * 0.125,
    ]


@torch.no_grad()
def test_likenesses_are_told_apart() -> None:
    """By a constant, an operand, and the values of a tensor that no input goes into."""
    args = (torch.randn(5, 256), torch.randn(256, 8), torch.randn(5, 1))
    for _ in range(2):  # with nothing known, and with all
        found, report = run_fused(scaled, *args, fusions="head_gate")
        assert_same(found, scaled(*args))
        times = [record.reason.partition("times ")[2] for record in report.fused]
        assert [text.split(",")[0].split(" ")[0] for text in times] == ["0.25", "0.5", "0.25", "0.25", "0.125"]


def masked(q: Tensor, k: Tensor, w: Tensor) -> list[Tensor]:
    found = []
    for diagonal in (1, 2, 1):
        hidden = torch.ones(6, 10, dtype=torch.bool).triu(diagonal)
        k = torch.tanh(k @ k.mT @ k)
        scored = (torch.einsum("shd,td->sht", q, k).relu() * w.unsqueeze(-1)).sum(1)
        found.append(scored.masked_fill(hidden, -1e4).topk(3).values)
    return found


@torch.no_grad()
def test_masks_are_told_apart() -> None:
    args = (torch.randn(6, 8, 16), torch.randn(10, 16), torch.randn(6, 8))
    found, report = run_fused(masked, *args, fusions="index_score", always_profitable=True)
    assert report.counts["index_score"] == 3, str(report)
    assert_same(found, masked(*args), 1e-4, 1e-4)


def test_what_names_nodes_elsewhere_is_not_remembered() -> None:
    graph = torch.fx.Graph()
    x, elsewhere = graph.placeholder("x"), graph.placeholder("elsewhere")
    root = graph.call_function(torch.ops.aten.relu.default, (x,))
    for node in (x, elsewhere, root):
        node.meta["val"] = torch.empty(2)
    alike = likeness(root, [x], [])
    for result, times in (([root, x], 1), ([root, elsewhere], 4)):
        proofs: Proofs[list[torch.fx.Node]] = Proofs()
        counts: collections.Counter[str] = collections.Counter()
        prove = _counting(counts, "proofs", functools.partial(list, result))
        assert [alike.proved(proofs, prove) for _ in range(2)] == [result, result]
        assert counts["proofs"] == times
