"""Arguments of `rotate_pairs_` in every layout, and what it has to compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def halves(x: Tensor, channels: int) -> Tensor:
    """The first channels of [A, B, C, D] as pairs of one channel from each half."""
    return x[..., :channels].unflatten(-1, (2, -1))


def neighbours(x: Tensor, channels: int) -> Tensor:
    """The first channels of [A, B, C, D] as pairs of neighbours."""
    return x[..., :channels].unflatten(-1, (-1, 2)).mT


# How x lies in memory, of shape [2, 3, 5, D].
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "heads_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "wide_rows": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3 : x.shape[3] + 3],
    "channels_first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "every_other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}

PAIRINGS = {"halves": halves, "neighbours": neighbours}

# The shapes of cosines and sines for pairs [2, 3, 5, 2, N].
SHARED: dict[str, tuple[int, ...]] = {
    "by_rows": (2, 3, 5, 1),
    "by_heads": (1, 3, 1, 1),
    "by_tokens": (2, 1, 1, 1),
    "one": (1, 1, 1, 1),
    "of_each_number": (2, 1, 5, 2),
}


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Random numbers that are the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def exact(pairs: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """The rotation in float64, as multiplication by a complex number where both of a pair share its factors."""
    wide, c, s = pairs.double(), cos.double().expand(pairs.shape), sin.double().expand(pairs.shape)
    if inverse:
        s = -s
    if cos.shape[3] == sin.shape[3] == 1:
        turned = torch.complex(wide.select(3, 0), wide.select(3, 1)) * torch.complex(c.select(3, 0), s.select(3, 0))
        return torch.stack([turned.real, turned.imag], 3)
    first, second = wide.unbind(3)
    (c1, c2), (s1, s2) = c.unbind(3), s.unbind(3)
    return torch.stack([first * c1 - second * s1, second * c2 + first * s2], 3)


def close(actual: Tensor, wanted: Tensor) -> None:
    """One rounding to the result's dtype and those of float32 arithmetic apart."""
    unit = torch.finfo(actual.dtype).eps
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(actual.double(), wanted, rtol=unit, atol=2e-7 * largest)
