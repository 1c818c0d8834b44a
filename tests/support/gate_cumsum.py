"""Shared by the tests of `gate_cumsum`: an independent float64 loop, and a launch of the kernel on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fusion_passes.ops.gate_cumsum import plan
from tests.support.programs import run

Tensor = torch.Tensor


def softplus(z: float, beta: float, threshold: float) -> float:
    return z if beta * z > threshold else math.log1p(math.exp(beta * z)) / beta


def expected(
    raw: Tensor, a_log: Tensor, bias: Tensor | None, chunk_size: int, bounds: Sequence[int], *,
    lower_bound: float | None = None, scale: float = 1.0, beta: float = 1.0, threshold: float = 20.0,
) -> Tensor:  # fmt: skip
    """c [B, T, H, K] in float64, element by element from the formula; chunks start anew at each bound."""
    batch, tokens, groups, per_group, channels = raw.shape
    z = raw.double() if bias is None else raw.double() + bias.double()
    rates = a_log.double().exp()
    if lower_bound is None:
        flat = [softplus(v, beta, threshold) for v in z.flatten().tolist()]
        gate = -rates * torch.tensor(flat, dtype=torch.float64).view(z.shape)
    else:
        gate = lower_bound / (1.0 + torch.exp(-(rates * z)))
    gate = gate.reshape(batch, tokens, groups * per_group, channels)
    out = torch.full_like(gate, math.nan)
    for start, end in zip(bounds, bounds[1:]):
        for t in range(start, end):
            fresh = (t - start) % chunk_size == 0
            out[:, t] = gate[:, t] if fresh else out[:, t - 1] + gate[:, t]
    return out * scale


def launch(args: tuple[Any, ...], arch: str = "sm_90") -> Tensor:
    """Run the op's kernel on its arguments, with an output of NaN that the kernel has to overwrite."""
    (out,) = run(plan, args, arch)
    return out


def per_token(out: Tensor, layout: str, tokens: int) -> Tensor:
    """The op's output as [B, N * C, H, K], tail rows included; [B, T, H, K] for packed sequences."""
    return out.permute([layout.index(axis) for axis in "bnchk"]).flatten(1, 2)
