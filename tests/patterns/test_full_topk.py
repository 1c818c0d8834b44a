"""A top-k of all entries: found in its spellings, refused where order or values matter, right for any scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusion_passes
from fusion_passes import hf_models
from fusion_passes.testing import assert_fuses, assert_refuses, run_fused

NAME = "full_topk"
KEYS = 12


def scores(rows: int = 5) -> Tensor:
    return torch.randn(2, rows, KEYS, generator=torch.Generator().manual_seed(rows))


def hugging_face(x: Tensor) -> Tensor:
    chosen = x.topk(min(64, x.shape[-1]), dim=-1).indices.to(torch.int32)
    return chosen.new_ones(x.shape, dtype=torch.bool).scatter(-1, chosen.long(), False).unsqueeze(1)


def additive(x: Tensor) -> Tensor:
    hidden = torch.full_like(x, float("-inf"))
    return hidden.scatter_(-1, torch.topk(x, KEYS)[1], 0.0)


def routing(x: Tensor) -> Tensor:
    """All groups of experts are kept."""
    group = x.view(10, 3, 4).topk(2, dim=-1)[0].sum(-1)
    mask = torch.zeros_like(group)
    mask.scatter_(1, torch.topk(group, k=3, dim=-1, sorted=False)[1], 1)
    return x.view(10, 3, 4).masked_fill(mask.unsqueeze(-1) == 0, 0.0)


def smallest(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.int64).scatter(2, x.topk(KEYS, largest=False).indices, 7)


def along_the_middle(x: Tensor) -> Tensor:
    return torch.ones_like(x).scatter(1, x.topk(5, dim=1).indices, -2.5)


def twice(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers share one selection."""
    chosen = x.topk(KEYS).indices
    return torch.ones_like(x).scatter(-1, chosen, 0.0), x.new_ones(x.shape, dtype=torch.bool).scatter(-1, chosen, False)


def over_a_product(x: Tensor) -> Tensor:
    return (x @ x.mT @ x).scatter(-1, (x @ x.mT @ x).relu().topk(KEYS).indices, 3.0)


SPELLINGS = [hugging_face, additive, routing, smallest, along_the_middle, twice, over_a_product]


@pytest.mark.parametrize("function", SPELLINGS)
def test_spellings(function: Callable[..., Any]) -> None:
    assert_fuses(function, scores(), fusion=NAME, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0])
def test_any_scores(value: float) -> None:
    """Ties, infinities and NaN: the indices are still every position once."""
    x = scores()
    x[0, :3], x[1, 2, ::2] = value, value
    assert_fuses(hugging_face, x, fusion=NAME)
    assert sorted(x.topk(KEYS).indices[0, 0].tolist()) == list(range(KEYS))


def test_a_symbolic_number_of_rows() -> None:
    x = scores()
    torch._dynamo.mark_dynamic(x, 1)
    assert_fuses(hugging_face, x, fusion=NAME)


LOOKALIKES: dict[str, tuple[Callable[..., Any], str]] = {
    "fewer": (lambda x: torch.ones_like(x).scatter(-1, x.topk(KEYS - 1).indices, 0.0), ""),
    "values_are_read": (
        lambda x: (lambda top: (torch.ones_like(x).scatter(-1, top[1], 0.0), top[0] + 1))(x.topk(KEYS)), "",
    ),
    "order_matters": (lambda x: x.gather(-1, x.topk(KEYS).indices), "its indices go to gather"),
    "sources_of_their_own": (
        lambda x: torch.ones_like(x).scatter(-1, x.topk(KEYS).indices, x * 2), "its indices go to scatter",
    ),
    "added_up": (
        lambda x: torch.ones_like(x).scatter_add(-1, x.topk(KEYS).indices, x), "its indices go to scatter_add",
    ),
    "another_axis": (
        lambda x: torch.ones(KEYS, 5, KEYS).scatter(0, x.topk(KEYS).indices, 0.0), "along another axis",
    ),
    "longer_rows": (
        lambda x: torch.ones(2, 5, KEYS + 1).scatter(-1, x.topk(KEYS).indices, 0.0), "writes to a part of a tensor",
    ),
    "more_rows": (
        lambda x: torch.ones(2, 6, KEYS).scatter(-1, x.topk(KEYS).indices, 0.0), "writes to a part of a tensor",
    ),
    "indices_as_values": (lambda x: x.topk(KEYS).indices.float() * 2, "its indices go to"),
    "shifted": (lambda x: torch.ones_like(x).scatter(-1, x.topk(KEYS).indices // 2, 0.0), "its indices go to"),
    "returned_too": (
        lambda x: (lambda top: (torch.ones_like(x).scatter(-1, top, 0.0), top))(x.topk(KEYS)[1]), "its indices go to",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes(name: str) -> None:
    function, reason = LOOKALIKES[name]
    x = scores()
    assert_refuses(function, x, fusion=NAME, reason=reason)
    torch.testing.assert_close(run_fused(function, x)[0], function(x))


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.bool, 2), (torch.float8_e4m3fn, 17), (torch.uint8, 256), (torch.bfloat16, 257), (torch.float16, 2049)],
    ids=str,
)
def test_casts_that_merge_positions(dtype: torch.dtype, most: int) -> None:
    """Indices may be cast to what tells all positions apart: one entry more, and two become one."""

    def function(x: Tensor) -> Tensor:
        return torch.ones_like(x).scatter(-1, x.topk(x.shape[-1]).indices.to(dtype).long(), 0.0)

    assert_fuses(function, torch.randn(3, most), fusion=NAME, rtol=0.0, atol=0.0)
    longer = torch.randn(3, most + 1)
    assert function(longer).any()
    assert_refuses(function, longer, fusion=NAME, reason="its indices go to convert_element_type")


def test_a_symbolic_number_of_entries() -> None:
    """k = n holds for every n, but so would k = min(64, n) at the sizes that are tried."""
    x = scores()
    torch._dynamo.mark_dynamic(x, 2)
    assert_refuses(lambda x: torch.ones_like(x).scatter(-1, x.topk(x.shape[-1]).indices, 0.0), x, fusion=NAME)


def test_the_indexer_is_gone() -> None:
    """Where the prompt is no longer than the selection, no score is computed; where it is, the scores are fused."""
    for tokens, wanted in ((48, {NAME: 2}), (80, {"index_score": 2, "head_gate": 2})):
        model, inputs = hf_models.build("deepseek_v32", dtype=torch.float32, layers=2, seq=tokens)
        with torch.no_grad():
            report = fusion_passes.explain(model, **inputs)
        assert dict(report.counts) == wanted, report


def test_compiled_code_has_neither_scores_nor_sort() -> None:
    from torch._inductor.utils import run_and_get_code

    def function(x: Tensor) -> Tensor:
        return torch.ones_like(x).scatter(-1, (x @ x.mT @ x).relu().topk(KEYS).indices, 0.0) + x

    with fusion_passes.config.patch(reference_on_cpu=True, strict=True):
        found, (code,) = run_and_get_code(torch.compile(function, backend="fusion_passes"), scores())
    assert torch.equal(found, scores())
    assert "aten.topk" not in code and "extern_kernels.bmm(" not in code


def test_training_keeps_gradients() -> None:
    x = scores().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return (x * hugging_face(x).squeeze(1).float() + x.pow(2)).sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    with fusion_passes.config.patch(reference_on_cpu=True, strict=True):
        (actual,) = torch.autograd.grad(torch.compile(loss, backend="fusion_passes")(x), x)
    torch.testing.assert_close(actual, expected)
