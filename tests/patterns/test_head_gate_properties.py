"""Composed spellings of a head gate are found and keep their value; those with a defect keep their value too."""

from __future__ import annotations

import collections
import dataclasses

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion_passes.testing import run_fused
from tests.support.properties import profile

NAME = "head_gate"
COLUMNS = 256
PROFILE = profile(16)
FOUND: collections.Counter[bool] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One sentence of the grammar; called, it reads itself as a function of x, weight and q."""

    product: str
    upcast: bool
    weights: torch.dtype
    constants: tuple[tuple[str, float], ...]
    q: str
    q_at: int
    unsqueezed: bool
    heads: int
    batch: int
    tokens: int
    defect: str = ""

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(self.batch, self.tokens, COLUMNS, generator=generator).bfloat16()
        weight = (torch.randn(self.heads, COLUMNS, generator=generator) / 16).to(self.weights)
        width = 1 if self.q == "row" else self.heads
        return x, weight, torch.rand(self.batch, self.tokens, width, generator=generator) + 0.5

    def __call__(self, x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
        wide = self.upcast or self.weights == torch.float32
        if wide:
            x, weight = x.float(), weight.float()
        out = self.multiplied(x, weight)
        out = self.spoilt(out.float())
        if self.unsqueezed:
            out, q = out.unsqueeze(-1), q.unsqueeze(-1)
        for index in range(len(self.constants) + 1):
            if index == self.q_at and self.q != "none":
                out = out * q if index % 2 else q * out
            if index < len(self.constants):
                out = self.scaled(out, *self.constants[index])
        return out.squeeze(-1) if self.unsqueezed else out

    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.product == "linear":
            return torch.nn.functional.linear(x, weight)
        if self.product == "matmul":
            return x @ weight.t()
        if self.product == "einsum":
            return torch.einsum("btk,hk->bth", x, weight)
        if self.product == "flat":
            return (x.reshape(-1, COLUMNS) @ weight.mT).view(*x.shape[:2], -1)
        return torch.matmul(weight, x.mT).mT

    def scaled(self, out: Tensor, how: str, number: float) -> Tensor:
        return out / number if how == "divide" else number * out if how == "left" else out * number

    def spoilt(self, out: Tensor) -> Tensor:
        if self.defect == "shifted":
            return out + 0.01
        if self.defect == "first head doubled":
            return torch.cat([out[..., :1] * 2, out[..., 1:]], -1)
        if self.defect == "clamped":
            return out.clamp(min=-0.5)
        if self.defect == "rolled":
            return out.roll(1, -1)
        if self.defect == "last token lost":
            return torch.nn.functional.pad(out[:, :-1], (0, 0, 0, 1))
        return out


SPELLINGS = st.builds(
    Spelling,
    product=st.sampled_from(("linear", "matmul", "einsum", "flat", "left")),
    upcast=st.booleans(),
    weights=st.sampled_from((torch.bfloat16, torch.float32)),
    constants=st.lists(
        st.tuples(st.sampled_from(("divide", "left", "right")), st.sampled_from((0.125, 0.3, 8.0, -1.7))),
        min_size=1, max_size=3,
    ).map(tuple),
    q=st.sampled_from(("none", "full", "row")),
    q_at=st.integers(0, 1),
    unsqueezed=st.booleans(),
    heads=st.sampled_from((8, 24, 64)),
    batch=st.sampled_from((1, 2)),
    tokens=st.sampled_from((2, 5)),
)  # fmt: skip
DEFECTS = st.sampled_from(("shifted", "first head doubled", "clamped", "rolled", "last token lost"))


def assert_same(actual: Tensor, spelling: Spelling, inputs: tuple[Tensor, ...]) -> None:
    expected = spelling(*inputs)
    assert actual.shape == expected.shape and actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-2)
    error = float((actual - expected).norm() / expected.norm())
    assert error <= (2e-6 if spelling.upcast or spelling.weights == torch.float32 else 2e-3), error


@PROFILE
@given(SPELLINGS)
@torch.no_grad()
def test_composed_spellings(spelling: Spelling) -> None:
    inputs = spelling.inputs()
    actual, report = run_fused(spelling, *inputs, fusions=NAME)
    factors = [1 / number if how == "divide" else number for how, number in spelling.constants]
    constant = torch.tensor(factors, dtype=torch.float64).prod()
    if abs(float(constant) - 1) > 1e-6:
        FOUND[report.counts[NAME] == 1] += 1
        assert report.counts[NAME] == 1, f"{spelling}\n{report}"
    assert_same(actual, spelling, inputs)


@PROFILE
@given(SPELLINGS, DEFECTS)
@torch.no_grad()
def test_composed_spellings_with_a_defect_keep_their_value(spelling: Spelling, defect: str) -> None:
    spoilt = dataclasses.replace(spelling, defect=defect)
    inputs = spoilt.inputs()
    actual, report = run_fused(spoilt, *inputs, fusions=NAME, always_profitable=True)
    assert report.counts[NAME] == 0, f"{spoilt}\n{report}"
    assert_same(actual, spoilt, inputs)


def test_all_composed_spellings_were_found() -> None:
    assert not FOUND or FOUND[False] == 0
