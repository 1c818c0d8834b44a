"""`rotate_pairs_kernel` against complex multiplication in float64, on the interpreter; what is beside stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusion_passes.ops.rotate_pairs import plan
from tests.support.programs import run
from tests.support.rotate_pairs import LAYOUTS, PAIRINGS, SHARED, close, exact, normal


def check(x: Tensor, pairing: str, channels: int, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    pairs, before = PAIRINGS[pairing](x, channels), x.clone()
    wanted = exact(PAIRINGS[pairing](before, channels), cos, sin, inverse)
    run(plan, (pairs, cos, sin, inverse))
    close(pairs, wanted)
    assert torch.equal(x[..., channels:], before[..., channels:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("shared", SHARED)
def test_layouts(layout: str, pairing: str, shared: str) -> None:
    x = LAYOUTS[layout](normal(2, 3, 5, 20, dtype=torch.bfloat16))
    cos, sin = (normal(*SHARED[shared], 8, seed=seed) for seed in (1, 2))
    check(x, pairing, 16, cos, sin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_dtypes(dtype: torch.dtype, factors: torch.dtype, pairing: str) -> None:
    cos, sin = (normal(2, 1, 5, 1, 4, dtype=factors, seed=seed) for seed in (1, 2))
    check(normal(2, 3, 5, 12, dtype=dtype), pairing, 8, cos, sin)


@pytest.mark.parametrize("channels", [2, 6, 24, 64, 90])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("inverse", [False, True])
def test_widths(channels: int, pairing: str, inverse: bool) -> None:
    """Widths that are no power of two leave lanes without work."""
    cos, sin = (normal(1, 1, 5, 1, channels // 2, seed=seed) for seed in (1, 2))
    check(normal(1, 3, 5, channels + 3), pairing, channels, cos, sin, inverse)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
def test_rows(rows: int) -> None:
    """Blocks that end inside of the last rows."""
    cos, sin = (normal(1, rows, 1, 1, 16, seed=seed) for seed in (1, 2))
    check(normal(1, rows, 1, 40), "halves", 32, cos, sin)


def test_factors_with_strides_and_offsets() -> None:
    table = normal(5, 40)
    cos, sin = (table[:, first : first + 4][None, None, :, None] for first in (3, 20))
    check(normal(2, 3, 5, 12), "neighbours", 8, cos, sin)
