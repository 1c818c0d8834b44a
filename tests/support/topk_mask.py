"""Shared by the tests of `topk_mask`: scores of all kinds, an independent reference, and a launch on any device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusion_passes.ops.topk_mask import plan
from tests.support.programs import run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def bits(x: Tensor) -> Tensor:
    """Random bit patterns of the same shape and dtype: NaN of both signs, infinities, tiny numbers, both zeros."""
    integer = torch.int32 if x.dtype.itemsize == 4 else torch.int16
    info = torch.iinfo(integer)
    generator = torch.Generator(x.device.type).manual_seed(x.numel())
    whole = torch.randint(info.min, info.max, x.shape, generator=generator, device=x.device, dtype=integer)
    return whole.view(x.dtype)


# What scores may be, made of normal random numbers [R, T].
REGIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "bits": bits,
    "relu": lambda x: x.relu(),
    "few_values": lambda x: (x * 2).round(),
    "all_equal": lambda x: torch.full_like(x, -1.5),
    "both_zeros": lambda x: torch.where(x > 0.5, x, torch.where(x > 0, 0.0, -0.0)),
    "causal": lambda x: x.masked_fill(torch.ones_like(x, dtype=torch.bool).triu(1), -math.inf),
    "all_minus_infinity": lambda x: torch.full_like(x, -math.inf),
    "infinities": lambda x: torch.where(x > 1, math.inf, torch.where(x < -1, -math.inf, x)),
    "some_nan": lambda x: torch.where(x.abs() < 0.3, math.nan, x),
    "negative_nan": lambda x: torch.where(x > 0, -torch.full_like(x, math.nan).abs(), x),
    "all_nan": lambda x: torch.full_like(x, math.nan),
    "tiny": lambda x: (x * torch.finfo(x.dtype).tiny / 4).to(x.dtype),
    "huge": lambda x: (x.sign() * torch.finfo(x.dtype).max * (1 - x.abs() / 8)).to(x.dtype),
    "ascending": lambda x: torch.arange(x.numel(), device=x.device).view(x.shape).to(x.dtype),
}


def expected(scores: Tensor, k: int, largest: bool) -> Tensor:
    """Counts for every entry those ahead of it, those that are equal and stand in front included: O(T^2)."""
    x = scores.cpu().double()
    x = torch.where(x.isnan(), math.inf, x)
    # NaN is above infinity: by a second number that is compared where the first are equal.
    nan = scores.cpu().isnan().double()
    (a, b), (p, q) = (x[..., :, None], x[..., None, :]), (nan[..., :, None], nan[..., None, :])
    better = (b > a) | ((b == a) & (q > p)) if largest else (b < a) | ((b == a) & (q < p))
    place = torch.arange(x.shape[-1])
    ahead = better | ((a == b) & (p == q) & (place[None, :] < place[:, None]))
    return (ahead.sum(-1) < k).to(scores.device)


def launch(scores: Tensor, k: int, largest: bool = True, arch: str = "sm_90", **options: Any) -> Tensor:
    """Run the op's kernel, with a result that is no bool until it is overwritten."""
    (mask,) = run(plan, (scores, k, largest), arch, **options)
    return mask


def same(actual: Tensor, wanted: Tensor) -> None:
    """Both are the same bool mask, in which True is 1, and `actual` is contiguous."""
    assert actual.dtype == wanted.dtype == torch.bool and actual.shape == wanted.shape and actual.is_contiguous()
    different = (actual.view(torch.uint8) != wanted.view(torch.uint8)).nonzero()
    assert not len(different), f"{len(different)} entries differ, the first at {different[0].tolist()}"
