"""`topk_mask_kernel` against counting, on the interpreter; results start as no bool, so each must be written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusion_passes import tuning
from fusion_passes.ops.topk_mask import reference
from tests.support.topk_mask import DTYPES, REGIMES, drawn, expected, launch, same


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(regime: str, largest: bool, dtype: torch.dtype) -> None:
    scores = REGIMES[regime](drawn(3, 27, dtype=dtype))
    for k in (1, 9, 27):
        same(launch(scores, k, largest), expected(scores, k, largest))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 31, 32, 33, 100, 128])
def test_lengths(length: int) -> None:
    """Every k, with ties at the limit and without."""
    for scores in (drawn(2, length), (drawn(2, length) * 2).round()):
        for k in {1, 2, length // 2, length - 1, length} & set(range(1, length + 1)):
            same(launch(scores, k), expected(scores, k, True))


def test_what_is_behind_a_row_is_not_counted() -> None:
    """The last entries of each block lie in the next row: greater than all of this one, and smaller."""
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [9.0, 9.0, 9.0, 9.0, 9.0], [-9.0, -8.0, -7.0, -6.0, -5.0]])
    for largest in (True, False):
        same(launch(scores, 2, largest), expected(scores, 2, largest))


# How [2, 3, 20] may lie in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "wide_rows": lambda x: torch.nn.functional.pad(x, (3, 5), value=7.0)[..., 3 : x.shape[2] + 3],
    "every_other_row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "axes_swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one_row_for_all": lambda x: x[:1, :1].expand(x.shape),
    "batch_expanded": lambda x: x[:1].expand(x.shape),
    "four_axes": lambda x: x.view(2, 3, 4, 5)[:, :, :2],
    "one_axis": lambda x: x.flatten(),
    "single_rows": lambda x: x[:, :1],
}


@pytest.mark.parametrize("inlined", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, inlined: bool) -> None:
    scores = LAYOUTS[layout](drawn(2, 3, 20))
    same(launch(scores, 4, inlined=inlined), expected(scores, 4, True))


@pytest.mark.parametrize("forced", ["warps=1", "warps=2", "warps=32"])
def test_long_rows(forced: str) -> None:
    scores = drawn(2, 2000).relu()
    with tuning.overriding(topk_mask=forced):
        for k in (500, 1500):
            same(launch(scores, k), reference(scores, k, True))
