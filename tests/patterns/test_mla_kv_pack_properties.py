"""Composed spellings of the MLA key and value are found and keep their value; so do graphs that are none."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion_passes.testing import run_fused
from tests.patterns.mla_kv_pack_cases import E4, E5, assert_same_bytes
from tests.support.properties import profile

NAME = "mla_kv_pack"
PROFILE = profile(18)
FOUND: collections.Counter[bool] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One sentence of the grammar; called, it reads itself as a function of the projection, k_pe and a scale."""

    build: str
    cast: str
    scaling: str
    clamp: float | None
    scale_first: bool
    heads: int
    nope: int
    pe: int
    value: int
    batch: int
    tokens: int
    head_first: bool
    pe_first: bool
    copied: bool
    dtype: torch.dtype
    wide: bool
    defect: str = ""

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        kv = torch.randn(self.batch, self.tokens, self.heads * (self.nope + self.value), generator=generator) * 20
        k_pe = torch.randn(self.batch, self.tokens, self.pe, generator=generator) * 20
        return kv.bfloat16(), k_pe.bfloat16(), torch.tensor(2.0)

    def scaled(self, part: Tensor, scale: Tensor) -> Tensor:
        """Steps that bfloat16 takes without rounding, so that eager PyTorch gives the same bytes."""
        if self.wide:
            part = part.float()
        steps = [self.clamped, lambda t: self.times(t, scale)]
        for step in steps[:: -1 if self.scale_first else 1]:
            part = step(part)
        return part

    def clamped(self, part: Tensor) -> Tensor:
        return part if self.clamp is None else part.clamp(-self.clamp, self.clamp)

    def times(self, part: Tensor, scale: Tensor) -> Tensor:
        if self.scaling == "tensor":
            return part * scale
        if self.scaling == "quotient":
            return part / scale
        if self.scaling == "number":
            return 0.5 * part
        return part * (1 / scale) if self.scaling == "reciprocal" else part

    def __call__(self, kv: Tensor, k_pe: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        windows = kv.unflatten(-1, (self.heads, self.nope + self.value))
        windows = windows.transpose(1, 2) if self.head_first else windows
        nope, v = windows.split([self.nope, self.value], -1)
        nope = nope.contiguous() if self.copied else nope
        shared = k_pe.unsqueeze(1 if self.head_first else 2)
        parts = self.spoilt([nope, shared.expand(*nope.shape[:3], self.pe)])
        early = self.cast == "before"
        parts = [self.scaled(p, scale).to(self.dtype) if early else p for p in parts]
        k = self.built(parts[::-1] if self.pe_first else parts)
        k = k if early else self.scaled(k, scale).to(self.dtype)
        return k, self.scaled(v, scale).to(self.dtype)

    def spoilt(self, parts: list[Tensor]) -> list[Tensor]:
        nope, shared = parts
        if self.defect == "heads differ":
            shared = torch.cat([shared[..., :1] * 2, shared[..., 1:]], -1)
        elif self.defect == "shifted":
            nope = torch.cat([nope[..., 1:], nope[..., :1]], -1)
        elif self.defect == "token lost":
            nope = torch.nn.functional.pad(nope[:, :, 1:], (0, 0, 1, 0))
        elif self.defect == "one scaled":
            shared = shared * 2
        elif self.defect == "negated":
            nope = -nope
        return [nope, shared]

    def built(self, parts: list[Tensor]) -> Tensor:
        if self.build == "cat":
            return torch.cat(parts, -1)
        shape = (*parts[0].shape[:3], parts[0].shape[-1] + parts[1].shape[-1])
        k = parts[0].new_empty(shape) if self.build == "empty" else torch.zeros(shape, dtype=parts[0].dtype)
        border = parts[0].shape[-1]
        if self.build == "copy":
            k[..., :border].copy_(parts[0])
            k[..., border:].copy_(parts[1])
        else:
            k[..., border:] = parts[1]
            k[..., :border] = parts[0]
        return k


WIDTHS = st.sampled_from((8, 16, 24, 40))
SPELLINGS = st.builds(
    Spelling,
    build=st.sampled_from(("cat", "empty", "zeros", "copy")),
    cast=st.sampled_from(("before", "after")),
    scaling=st.sampled_from(("none", "tensor", "quotient", "number", "reciprocal")),
    clamp=st.sampled_from((None, None, 16.0, 448.0)),
    scale_first=st.booleans(),
    heads=st.sampled_from((2, 3, 8)),
    nope=WIDTHS,
    pe=WIDTHS,
    value=WIDTHS,
    batch=st.sampled_from((1, 2)),
    tokens=st.sampled_from((2, 5)),
    head_first=st.booleans(),
    pe_first=st.booleans(),
    copied=st.booleans(),
    dtype=st.sampled_from((E4, E5)),
    wide=st.booleans(),
)
DEFECTS = st.sampled_from(("heads differ", "shifted", "token lost", "one scaled", "negated"))


def saturated(spelling: Spelling, inputs: tuple[Any, ...]) -> list[Tensor]:
    """What the spelling means, in float32."""
    wide = dataclasses.replace(spelling, dtype=torch.float32, wide=True)
    largest = torch.finfo(spelling.dtype).max
    results = wide(inputs[0].float(), inputs[1].float(), inputs[2])
    return [t.clamp(-largest, largest).to(spelling.dtype) for t in results]


@PROFILE
@given(SPELLINGS)
def test_composed_spellings(spelling: Spelling) -> None:
    inputs = spelling.inputs()
    actual, report = run_fused(spelling, *inputs, fusions=NAME)
    FOUND[report.counts[NAME] == 1] += 1
    assert report.counts[NAME] == 1, f"{spelling}\n{report}"
    assert "value" in report.fused[0].reason, f"{spelling}\n{report}"
    assert_same_bytes(actual, saturated(spelling, inputs))


@PROFILE
@given(SPELLINGS, DEFECTS)
def test_composed_spellings_with_a_defect_keep_their_value(spelling: Spelling, defect: str) -> None:
    spoilt = dataclasses.replace(spelling, defect=defect)
    inputs = spoilt.inputs()
    actual, report = run_fused(spoilt, *inputs, fusions=NAME, always_profitable=True)
    assert_same_bytes(actual, saturated(spoilt, inputs))


def test_nearly_all_composed_spellings_were_found() -> None:
    assert not FOUND or FOUND[True] >= 0.95 * FOUND.total()
