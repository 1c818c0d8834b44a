"""Small functions with and without a gate, shared by the tests of the mechanism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def gate(raw: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    """Per-channel softplus gate of [B, T, H, K], padded to whole chunks, head-major sums [B, H, N, C, K]."""
    g = -torch.exp(a_log.float()).view(1, 1, -1, 1) * F.softplus(raw.float() + bias.float().view(raw.shape[-2:]))
    g = g.transpose(1, 2).contiguous()
    g = F.pad(g, (0, 0, 0, -raw.shape[1] % CHUNK))
    return g.reshape(*g.shape[:2], -1, CHUNK, g.shape[-1]).cumsum(-2)


def after_projection(x: Tensor, weight: Tensor, a_log: Tensor, bias: Tensor) -> Tensor:
    """The same gate behind a matrix product and in front of pointwise work, as in a model."""
    raw = (x @ weight).view(*x.shape[:2], a_log.numel(), -1)
    return gate(raw, a_log, bias).exp() * 2


def no_gate(x: Tensor, weight: Tensor) -> Tensor:
    """No anchor of any fusion."""
    return torch.relu(x @ weight) + 1


def inputs(
    batch: int = 1, tokens: int = 100, heads: int = 2, channels: int = 32, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """raw, a_log and bias for `gate`."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(batch, tokens, heads, channels, generator=generator).to(dtype)
    a_log = torch.rand(heads, generator=generator)
    bias = torch.randn(heads * channels, generator=generator)
    return raw, a_log, bias


def projection_inputs(tokens: int = 100, heads: int = 2, channels: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, a_log and bias for `after_projection`."""
    raw, a_log, bias = inputs(1, tokens, heads, channels)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, heads * channels, generator=generator)
    return torch.randn(1, tokens, 16, generator=generator), weight, a_log, bias
