"""Tables of functions to match or to leave alone, with their inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
Function = Callable[..., Any]

B, S, T, H, D = 2, 6, 10, 8, 16


@dataclasses.dataclass(frozen=True)
class Entry:
    """A function of q, k and w, or of what `make` returns, and why it must be left alone."""

    function: Function
    inputs: Callable[[], tuple[Tensor, ...]]
    reason: str = ""


Table = dict[str, Entry]


def qkw(
    *batch: int, queries: int = S, keys: int = T, heads: int = H, width: int = D, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], tuple[Tensor, ...]]:
    """q [.., S, H, D] and k [.., T, D] of a dtype, w [.., S, H] in float32, of either sign."""

    def make() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((queries, heads, width), (keys, width), (queries, heads))
        q, k, w = (torch.randn(*batch, *shape, generator=generator) for shape in shapes)
        return q.to(dtype), k.to(dtype), w

    return make


def entry(
    table: Table, make: Callable[[], tuple[Tensor, ...]] | None = None, reason: str = ""
) -> Callable[[Function], Function]:
    """Put the decorated function into a table under its own name."""

    def add(function: Function) -> Function:
        assert function.__name__ not in table
        table[function.__name__] = Entry(function, make or qkw(), reason)
        return function

    return add
