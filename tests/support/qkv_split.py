"""Shared by the tests of `qkv_split`: an independent reference, and a launch of the kernel on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_passes.ops.qkv_split import plan
from tests.support.programs import run


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every element a number of its own, as bits where the dtype has fewer values than there are elements."""
    count = math.prod(shape)
    if dtype.itemsize == 2:
        return torch.arange(count).remainder(0x7C00).to(torch.int16).view(dtype).reshape(shape)
    return torch.arange(count, dtype=dtype).reshape(shape)


def expected(
    x: Tensor, heads: Sequence[int], dims: Sequence[int], repeats: Sequence[int], head_major: bool
) -> list[Tensor]:
    """The results by indexing alone."""
    results, start = [], 0
    for count, dim, times in zip(heads, dims, repeats):
        lane = torch.arange(count * times)[:, None] // times * dim + torch.arange(dim)
        window = x.contiguous()[..., start + lane.to(x.device)]  # [B, T, H * R, K]
        results.append(window.transpose(1, 2).contiguous() if head_major else window)
        start += count * dim
    return results


def launch(args: tuple[Any, ...], arch: str = "sm_90") -> list[Tensor]:
    """Run the op's kernels on its arguments, with outputs of NaN that they have to overwrite."""
    return list(run(plan, args, arch))


def same_bits(actual: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Both are the same tensors bit by bit, NaN included, and those of `actual` are contiguous."""
    assert len(actual) == len(wanted)
    for index, (a, b) in enumerate(zip(actual, wanted)):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous(), (index, a.shape, b.shape)
        integer = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
        assert torch.equal(a.view(integer), b.contiguous().view(integer)), f"window {index} differs"
