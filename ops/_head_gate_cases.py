"""What `head_gate` is benchmarked on: the indexers of DeepSeek-V3.2 and GLM-5, and a model's own spelling."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fusion_passes.benchmarking import Case
from fusion_passes.ops.head_gate import OP, reference

Tensor = torch.Tensor


def cases() -> list[Case]:
    """7,168 columns and 64 heads (DeepSeek-V3.2), 6,144 and 32 (GLM-5): weights in bfloat16, as engines keep them, and
    in float32, as Hugging Face does; with and without a scale of the queries.

    Bytes: x, weights and scales read once, the result written once. FLOPs: two per product.
    """
    shapes = [(7168, 64, t, w) for t in (1, 4, 16, 64, 256, 2048, 8192) for w in (torch.bfloat16, torch.float32)]
    shapes += [(6144, 32, t, w) for t in (1, 64, 2048) for w in (torch.bfloat16, torch.float32)]
    plain_cases = [_case(*shape, with_scale=False) for shape in shapes]
    return plain_cases + [_case(7168, 64, t, torch.bfloat16, with_scale=True) for t in (1, 64, 2048)]


def _case(columns: int, heads: int, tokens: int, weights: torch.dtype, with_scale: bool) -> Case:
    scaled = " times q_scale" if with_scale else ""
    read = 2 * tokens * columns + weights.itemsize * heads * columns + (4 * tokens * heads if with_scale else 0)
    return Case(
        f"{columns}x{heads} T={tokens} {str(weights).removeprefix('torch.')} weights{scaled}",
        OP,
        functools.partial(_arguments, columns, heads, tokens, weights, with_scale),
        bytes=read + 4 * tokens * heads,
        flops=2 * tokens * heads * columns,
        reference=reference,
        plain=plain,
    )


def _arguments(
    columns: int, heads: int, tokens: int, weights: torch.dtype, with_scale: bool, device: torch.device,
    generator: torch.Generator,
) -> tuple[Any, ...]:  # fmt: skip
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, weight = draw(1, tokens, columns).bfloat16(), (draw(heads, columns) * columns**-0.5).to(weights)
    q_scale = draw(1, tokens, heads).abs() if with_scale else None
    return x, weight, q_scale, heads**-0.5 * 128**-0.5, weights, torch.float32, False


def plain(
    x: Tensor, weight: Tensor, q_scale: Tensor | None, scale: float, product_dtype: torch.dtype, dtype: torch.dtype,
    head_first: bool,
) -> Tensor:  # fmt: skip
    """A model's own spelling: the projection in the dtype of its weights, upcast and scaled."""
    weights = torch.nn.functional.linear(x.to(weight.dtype), weight).float() * scale
    return weights if q_scale is None else (weights.unsqueeze(-1) * q_scale.unsqueeze(-1)).squeeze(-1)
