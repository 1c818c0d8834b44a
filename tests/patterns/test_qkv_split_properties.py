"""Composed splits are found and keep every bit; composed views that are no split keep every bit too."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion_passes.testing import run_fused
from tests.support.properties import profile
from tests.support.qkv_split import numbered

NAME = "qkv_split"
PROFILE = profile(50)
FOUND: collections.Counter[bool] = collections.Counter()

# How [B, T, D] is stored, and how it is had from that.
STORED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "rows": (lambda x: x, lambda x: x),
    "columns": (lambda x: x.mT.contiguous(), lambda x: x.mT),
    "sequence first": (lambda x: x.transpose(0, 1).contiguous(), lambda x: x.transpose(0, 1)),
    "part of a row": (lambda x: torch.nn.functional.pad(x, (8, 24)), lambda x: x[..., 8:-24]),
    "early tokens": (lambda x: torch.nn.functional.pad(x.mT, (0, 3)), lambda x: x[..., :-3].mT),
    "late tokens": (lambda x: torch.nn.functional.pad(x, (0, 0, 2, 0)), lambda x: x[:, 2:]),
    "flat rows": (lambda x: x.reshape(-1, x.shape[2]), lambda x: x),
}
CUTS: dict[str, Callable[[Tensor, list[int]], list[Tensor]]] = {
    "split": lambda x, widths: list(x.split(widths, -1)),
    "slices": lambda x, widths: [x[..., sum(widths[:i]) : sum(widths[: i + 1])] for i in range(len(widths))],
    "narrow": lambda x, widths: [x.narrow(-1, sum(widths[:i]), w) for i, w in enumerate(widths)],
    "before the transpose": lambda x, widths: [p.mT for p in x.mT.split(widths, -2)],
}
COPIED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(memory_format=torch.contiguous_format),
    "buffer": lambda x: torch.empty(x.shape, dtype=x.dtype).copy_(x),
}


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One sentence of the grammar."""

    stored: str
    cut: str
    copied: str
    batch: int
    tokens: int
    heads: tuple[int, ...]
    dim: int
    repeat: int  # of all windows but the first
    head_major: bool
    backwards: bool
    dtype: torch.dtype

    def inputs(self) -> Tensor:
        x = numbered(self.batch, self.tokens, sum(self.heads) * self.dim, dtype=self.dtype)
        return STORED[self.stored][0](x).contiguous()

    def __call__(self, stored: Tensor) -> tuple[Tensor, ...]:
        x = STORED[self.stored][1](stored)
        x = x.unflatten(0, (self.batch, self.tokens)) if self.stored == "flat rows" else x
        found = []
        for index, part in enumerate(CUTS[self.cut](x, [h * self.dim for h in self.heads])):
            part = part.unflatten(-1, (-1, self.dim))
            if index and self.repeat > 1:
                part = part[..., None, :].expand(*part.shape[:3], self.repeat, self.dim)
            if self.head_major:
                part = part.movedim(1, -2)
            found.append(part)
        copies = [COPIED[self.copied](part) for part in (found[::-1] if self.backwards else found)]
        return tuple(copies)


@st.composite
def spellings(draw: st.DrawFn) -> Spelling:
    return Spelling(
        stored=draw(st.sampled_from(sorted(STORED))),
        cut=draw(st.sampled_from(sorted(CUTS))),
        copied=draw(st.sampled_from(sorted(COPIED))),
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.sampled_from((2, 5, 8, 16))),
        heads=tuple(draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))),
        dim=draw(st.sampled_from((8, 16, 24))),
        repeat=draw(st.sampled_from((1, 1, 2, 3))),
        head_major=draw(st.booleans()),
        backwards=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))),
    )


def same(actual: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, wanted, strict=True):
        integer = torch.int32 if a.dtype.itemsize == 4 else torch.int16
        assert a.shape == b.shape and a.stride() == b.stride() and torch.equal(a.view(integer), b.view(integer))


@PROFILE
@given(spellings())
@torch.no_grad()
def composed_splits(spelling: Spelling) -> None:
    x = spelling.inputs()
    actual, report = run_fused(spelling, x, always_profitable=True, fusions=NAME)
    FOUND[report.counts[NAME] == 1] += 1
    same(actual, spelling(x))


def test_composed_splits_are_found_and_keep_every_bit() -> None:
    FOUND.clear()
    composed_splits()
    assert FOUND.total() >= 50 and FOUND[True] >= 0.95 * FOUND.total(), FOUND


# ------------------------------------------------- views that are a split by chance at most

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(0, 1),
    "turn": lambda x: x.transpose(-1, -2),
    "first half": lambda x: x[: (x.shape[0] + 1) // 2],
    "all but the first": lambda x: x[..., 1:],
    "every other": lambda x: x[..., ::2],
    "halve": lambda x: x.unflatten(-1, (2, -1)) if x.shape[-1] % 2 == 0 else x,
    "halve rows": lambda x: x.unflatten(0, (2, -1)) if x.shape[0] % 2 == 0 else x,
    "repeat": lambda x: x.unsqueeze(-2).expand(*x.shape[:-1], 2, x.shape[-1]),
    "repeat rows": lambda x: x.expand(2, *x.shape),
    "flatten": lambda x: x.flatten(-2),
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.movedim(0, -1),
    "diagonal": lambda x: x.diagonal(dim1=0, dim2=-1),
    "windows": lambda x: x.unfold(0, 2, 1),
}


@PROFILE
@given(
    st.lists(st.sampled_from(sorted(MOVES)), max_size=3),
    st.lists(st.lists(st.sampled_from(sorted(MOVES)), max_size=2), min_size=2, max_size=3),
    st.sampled_from((8, 16, 24)),
    st.booleans(),
)
@torch.no_grad()
def test_any_copies_keep_every_bit(
    before: list[str], after: list[list[str]], width: int, alike: bool
) -> None:
    def f(x: Tensor) -> Any:
        for move in before:
            x = MOVES[move](x)
        parts = x.split(max(8, min(width, x.shape[-1] // 2)), -1)
        copies = []
        for part, moves in zip(parts, after):
            for move in after[0] if alike else moves:
                part = MOVES[move](part) if part.dim() > 1 and part.numel() else part
            copies.append(part.contiguous().clone())
        return tuple(copies)

    x = numbered(4, 6, 48)
    try:
        wanted = f(x)
    except (RuntimeError, IndexError):  # moves that do not go together
        return
    actual, _ = run_fused(f, x, always_profitable=True, fusions=NAME)
    same(actual, wanted)
