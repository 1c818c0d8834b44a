"""What `topk_mask` is benchmarked on: the selections of sparse attention, and a model's own spelling."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fusion_passes.benchmarking import Case
from fusion_passes.ops.topk_mask import OP, reference

Tensor = torch.Tensor

# Rows, entries of a row, dtype, and the share of scores that are 0, as behind a relu.
SHAPES: tuple[tuple[int, int, torch.dtype, float], ...] = (
    (1, 8192, torch.float32, 0.0),
    (64, 8192, torch.float32, 0.0),
    (2048, 8192, torch.float32, 0.0),
    (8192, 8192, torch.float32, 0.0),
    (4096, 4096, torch.float32, 0.0),
    (8192, 3072, torch.float32, 0.0),
    (512, 32768, torch.float32, 0.0),
    (2048, 8192, torch.float32, 0.3),
    (2048, 8192, torch.bfloat16, 0.0),
)
K = 2048


def cases() -> list[Case]:
    """The 2,048 greatest of each row (DeepSeek-V3.2), for prompts of 3,072 to 32,768 keys and few or many queries.

    Bytes: the scores read once, a byte for each written once. No scores are equal to the last one that is selected, for
    PyTorch leaves open which of those it takes. 16-bit ones are a permutation of as many numbers as a row has entries.
    """
    return [_case(*shape) for shape in SHAPES]


def _case(rows: int, length: int, dtype: torch.dtype, zeros: float) -> Case:
    some = f", {zeros:.0%} of them 0" if zeros else ""
    return Case(
        f"{str(dtype).removeprefix('torch.')} {rows} rows of {length}{some}",
        OP,
        functools.partial(_arguments, rows, length, dtype, zeros),
        bytes=rows * length * (dtype.itemsize + 1),
        flops=0,
        reference=reference,
        plain=plain,
        bound=0.0,
    )


def _arguments(
    rows: int, length: int, dtype: torch.dtype, zeros: float, device: torch.device, generator: torch.Generator
) -> tuple[Any, ...]:
    x, order = torch.randn(1, rows, length, generator=generator, device=device).sort(-1)
    place = torch.arange(length, device=device)
    # Equal numbers come apart.
    x += 1e-6 * place
    x.masked_fill_(torch.rand(x.shape, generator=generator, device=device) < zeros, 0.0)
    if dtype != torch.float32:
        signed = place - length // 2
        x = signed.abs().to(torch.int16).view(dtype).copysign(signed).expand_as(x)
    return torch.empty_like(x).scatter_(-1, order, x), K, True


def plain(scores: Tensor, k: int, largest: bool) -> Tensor:
    """A model's own spelling of the benchmarked cases."""
    chosen = scores.topk(k, dim=-1, largest=largest).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
