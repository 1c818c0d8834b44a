"""Composed spellings of the index score are found and keep their value; so do graphs that are none."""

from __future__ import annotations

import collections
import dataclasses
import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fusion_passes.testing import assert_same
from tests.support.delta_rule import passed
from tests.support.properties import profile

NAME = "index_score"
PROFILE = profile(20)
FOUND: collections.Counter[bool] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One sentence of the grammar; called, it reads itself as a function of q, k, w and a mask."""

    order: str
    product: str
    activation: str
    weighting: str
    mask: str
    scale: float
    scale_at: str
    batch: int
    queries: int
    keys: int
    heads: int
    dtype: torch.dtype
    defect: str = ""

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(5)
        shape = {"bshd": (self.batch, self.queries, self.heads), "bhsd": (self.batch, self.heads, self.queries)}
        q = torch.randn(*shape[self.order], 16, generator=generator).to(self.dtype)
        k = torch.randn(self.batch, self.keys, 16, generator=generator).to(self.dtype)
        w = torch.randn(self.batch, self.queries, self.heads, generator=generator)
        return q, k, w, torch.rand(self.batch, self.queries, self.keys, generator=generator) < 0.6

    def __call__(self, q: Tensor, k: Tensor, w: Tensor, mask: Tensor) -> Tensor:
        query = q if self.order == "bshd" else q.transpose(1, 2)
        query, key = query.float(), k.float()
        if self.defect == "keys lost":
            key = functional.pad(key[:, 1:], (0, 0, 1, 0))
        products = self.multiplied(query, key)  # [B, S, H, T]
        products = self.activated(products * self.scale if self.scale_at == "inside" else products)
        weights = w.abs() if self.defect == "absolute weights" else w
        scores = self.weighted(products, weights * self.scale if self.scale_at == "weights" else weights)
        scores = scores * self.scale if self.scale_at == "outside" else scores
        return self.masked(scores, mask).topk(2).values

    def multiplied(self, query: Tensor, key: Tensor) -> Tensor:
        if self.product == "einsum":
            return torch.einsum("bshd,btd->bsht", query, key)
        if self.product == "rows":
            flat = query.reshape(self.batch, self.queries * self.heads, 16) @ key.mT
            return flat.view(self.batch, self.queries, self.heads, self.keys)
        return query @ key.mT.unsqueeze(1)

    def activated(self, x: Tensor) -> Tensor:
        if self.defect == "softplus":
            return functional.softplus(x, beta=10.0)
        if self.defect == "shifted":
            return (x - 0.05).relu()
        if self.activation == "clamp":
            return x.clamp(min=0)
        if self.activation == "maximum":
            return torch.maximum(x, x.new_zeros(()))
        return x.relu() if self.activation == "relu" else torch.where(x > 0, x, torch.zeros_like(x))

    def weighted(self, x: Tensor, w: Tensor) -> Tensor:
        if self.defect == "head lost":
            x, w = x[:, :, 1:], w[:, :, 1:]
        if self.weighting == "einsum":
            return torch.einsum("bsht,bsh->bst", x, w)
        if self.weighting == "row":
            return (w.unsqueeze(2) @ x).squeeze(2)
        return (x * w.unsqueeze(-1)).sum(2)

    def masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        if self.mask == "fill":
            return scores.masked_fill(mask, -math.inf)
        if self.mask == "where":
            return torch.where(mask, scores, torch.finfo(scores.dtype).min)
        if self.mask == "sum":
            return scores + mask.float()
        if self.mask == "causal":
            return scores.masked_fill(torch.ones_like(mask).tril(self.keys - self.queries).logical_not(), -1e9)
        return scores


SPELLINGS = st.builds(
    Spelling,
    order=st.sampled_from(("bshd", "bhsd")),
    product=st.sampled_from(("einsum", "rows", "matmul")),
    activation=st.sampled_from(("relu", "clamp", "maximum", "where")),
    weighting=st.sampled_from(("einsum", "row", "sum")),
    mask=st.sampled_from(("none", "fill", "where", "sum", "causal")),
    scale=st.sampled_from((1.0, 0.125, 3.7)),
    scale_at=st.sampled_from(("inside", "weights", "outside")),
    batch=st.sampled_from((1, 3)),
    queries=st.sampled_from((1, 4, 5)),
    keys=st.sampled_from((5, 9)),
    heads=st.sampled_from((2, 8, 12)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
)
DEFECTS = st.sampled_from(("keys lost", "absolute weights", "softplus", "shifted", "head lost"))


def fused(spelling: Spelling) -> bool:
    """Whether the spelling is found; its value has to be kept in any case."""
    inputs = spelling.inputs()
    module, records = passed(spelling, *inputs)
    assert_same(module(*inputs), spelling(*inputs))
    return any(record.fusion == NAME and record.outcome == "fused" for record in records)


@PROFILE
@given(SPELLINGS)
def test_composed_spellings(spelling: Spelling) -> None:
    found = fused(spelling)
    FOUND[found] += 1
    assert found, spelling


@PROFILE
@given(SPELLINGS, DEFECTS)
def test_composed_spellings_with_a_defect_keep_their_value(spelling: Spelling, defect: str) -> None:
    found = fused(dataclasses.replace(spelling, defect=defect))
    if defect in ("softplus", "shifted"):
        assert not found, (spelling, defect)


def test_the_grammar_was_used() -> None:
    assert not FOUND or FOUND[True] >= 15
