"""What `index_score` is benchmarked on: the indexer of DeepSeek-V3.2 and GLM-5, prefill and decode."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fusion_passes.benchmarking import Case
from fusion_passes.ops.index_score import OP, reference

Tensor = torch.Tensor

WIDTH = 128
FLOAT8 = torch.float8_e4m3fn
# float8 operands: the bits that sm_90 drops when it adds up their products.
FLOAT8_BOUND = 2e-3


def cases() -> list[Case]:
    """64 heads of 128 channels (and 32), causal or with a mask in memory: prefill, chunks and decode.

    Bytes: every tensor once. FLOPs: 2 H D per score that the mask leaves; the sum over heads is not counted.
    """
    prefill = [(2048, 8192, 64), (8192, 8192, 64), (2048, 8192, 32), (64, 8192, 64)]
    decode = [(1, 65536, 64), (1, 8192, 64), (16, 8192, 64)]
    found = [_case(*shape, dtype, "causal") for shape in prefill for dtype in (torch.bfloat16, FLOAT8)]
    found += [_case(2048, 8192, 64, torch.bfloat16, kind) for kind in ("keep", "add", "none")]
    found += [_case(*shape, dtype, "none") for shape in decode for dtype in (torch.bfloat16, FLOAT8)]
    return [*found, _case(1, 65536, 64, torch.bfloat16, "keep"), _case(2048, 2048, 64, torch.float32, "causal")]


def _case(queries: int, keys: int, heads: int, dtype: torch.dtype, kind: str) -> Case:
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, "fp8")
    seen = queries * keys - (queries * (queries - 1) // 2 if kind != "none" else 0)
    masks = {"keep": 1, "add": 4}.get(kind, 0)
    scales = 4 * keys if dtype == FLOAT8 else 0
    flops = 2 * seen * heads * WIDTH
    return Case(
        f"{name} {queries}x{keys} H={heads} {kind}",
        OP,
        functools.partial(_arguments, queries, keys, heads, dtype, kind),
        bytes=(queries * heads + keys) * WIDTH * dtype.itemsize + 4 * queries * heads + scales
        + (4 + masks) * queries * keys,
        # Tensor cores multiply float8 at twice the rate of bfloat16, and TF32 three times at half of it.
        flops=flops // 2 if dtype == FLOAT8 else 6 * flops if dtype == torch.float32 else flops,
        reference=reference,
        plain=plain,
        bound=FLOAT8_BOUND if dtype == FLOAT8 else None,
    )  # fmt: skip


def _arguments(
    queries: int, keys: int, heads: int, dtype: torch.dtype, kind: str, device: torch.device,
    generator: torch.Generator,
) -> tuple[Any, ...]:  # fmt: skip
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q, k, w = normal(1, queries, heads, WIDTH).to(dtype), normal(1, keys, WIDTH).to(dtype), normal(1, queries, heads)
    k_scale = normal(1, keys).abs() if dtype == FLOAT8 else None
    mask = None
    if kind in ("keep", "add"):
        mask = _seen(queries, keys, device)[None]
        mask = mask if kind == "keep" else torch.where(mask, 0.0, -torch.inf)
    form = (kind, keys - queries, (heads * WIDTH) ** -0.5, float("-inf"), True, k_scale is not None)
    return q, k, w, None, k_scale, mask, *form, "tf32x3", torch.float32, "bst"


def _seen(queries: int, keys: int, device: torch.device) -> Tensor:
    positions = torch.arange(keys, device=device)
    return positions <= positions[keys - queries :, None]


def plain(
    q: Tensor, k: Tensor, w: Tensor, q_scale: None, k_scale: Tensor | None, mask: Tensor | None, kind: str,
    offset: int, scale: float, fill: float, *form: Any,
) -> Tensor:  # fmt: skip
    """The spelling of Hugging Face's models, and where the operands are float8 that of a reference for them."""
    scores = torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(1)) * scale
    index_scores = torch.matmul(w.unsqueeze(-2), torch.relu(scores)).squeeze(-2)
    if k_scale is not None:
        index_scores = index_scores * k_scale.unsqueeze(1)
    if kind == "none":
        return index_scores
    seen = mask if mask is not None else _seen(q.shape[1], k.shape[1], q.device)
    return index_scores + seen if kind == "add" else index_scores.masked_fill(~seen, fill)
