"""`qkv_split_kernel` against plain indexing, on the interpreter; outputs start as NaN, so each must be written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_passes import tuning
from fusion_passes.ops._qkv_split_kernel import MOST_WINDOWS
from tests.support.qkv_split import expected, launch, numbered, same_bits

SMALL = "rows=8,lanes=16,warps=1"

# How [B, T, D] may lie in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "time_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "wide_rows": lambda x: torch.nn.functional.pad(x, (8, 16))[..., 8 : x.shape[2] + 8],
    "odd_rows": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3 : x.shape[2] + 3],
    "padded_time": lambda x: torch.nn.functional.pad(x.mT.contiguous(), (0, 3))[..., : x.shape[1]].mT,
    "later_time": lambda x: torch.nn.functional.pad(x.mT.contiguous(), (8, 8))[..., 8 : x.shape[1] + 8].mT,
    "channels_outermost": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "every_other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def check(
    x: Tensor, heads: Sequence[int], dims: Sequence[int], repeats: Sequence[int] | None = None,
    head_major: bool = False, forced: str = SMALL,
) -> None:  # fmt: skip
    args: tuple[Any, ...] = (x, list(heads), list(dims), list(repeats or [1] * len(heads)), head_major)
    with tuning.overriding(qkv_split=forced):
        same_bits(launch(args), expected(*args))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("tokens", [1, 13, 16])
def test_layouts(layout: str, head_major: bool, tokens: int) -> None:
    x = LAYOUTS[layout](numbered(2, tokens, 64, dtype=torch.bfloat16))
    check(x, [1, 1, 2], [16] * 3, head_major=head_major)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["rows", "transposed", "odd_rows", "padded_time"])
def test_dtypes(layout: str, dtype: torch.dtype) -> None:
    check(LAYOUTS[layout](numbered(1, 19, 48, dtype=dtype)), [1, 2], [16, 16])


@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize(
    "heads, dims",
    [([3, 3, 6], [8, 8, 8]), ([1, 2], [24, 40]), ([2, 2, 2], [24, 24, 48]), ([5, 1], [8, 96]), ([1, 1], [8, 8])],
)
def test_widths_that_are_no_power_of_two(layout: str, head_major: bool, heads: list[int], dims: list[int]) -> None:
    width = sum(h * k for h, k in zip(heads, dims))
    check(LAYOUTS[layout](numbered(2, 11, width, dtype=torch.float16)), heads, dims, head_major=head_major)


@pytest.mark.parametrize("layout", ["rows", "transposed", "padded_time"])
@pytest.mark.parametrize("head_major", [False, True])
def test_repeated_heads(layout: str, head_major: bool) -> None:
    x = LAYOUTS[layout](numbered(2, 9, 80, dtype=torch.bfloat16))
    check(x, [2, 2, 1], [16, 16, 16], [1, 3, 2], head_major)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 13])
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_any_number_of_windows(layout: str, count: int) -> None:
    heads = [1 + index % 2 for index in range(count)]
    x = LAYOUTS[layout](numbered(1, 5, 8 * sum(heads), dtype=torch.bfloat16))
    check(x, heads, [8] * count)
    assert count <= MOST_WINDOWS or count in (7, 13)


@pytest.mark.parametrize("forced", ["rows=1,lanes=8,warps=1", "rows=32,lanes=8,warps=1", "rows=16,lanes=64,warps=2"])
@pytest.mark.parametrize("layout", ["rows", "transposed", "odd_rows", "padded_time"])
def test_tiles(layout: str, forced: str) -> None:
    check(LAYOUTS[layout](numbered(1, 37, 64, dtype=torch.bfloat16)), [2, 2], [16, 16], forced=forced)


@pytest.mark.parametrize("layout", ["rows", "transposed", "padded_time"])
def test_tuned_tiles(layout: str) -> None:
    x = LAYOUTS[layout](numbered(1, 200, 512, dtype=torch.bfloat16))
    args = (x, [1, 1, 2], [128] * 3, [1] * 3, False)
    same_bits(launch(args), expected(*args))
