"""A table of sites that are left alone, with what is said to help: what its entries are made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusion_passes.reports import Report
from fusion_passes.testing import run_fused

BF16, F32, F64, E4 = torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn
STATIC = "keep sizes numbers: dynamic=False and no mark_dynamic, or torch._dynamo.mark_static"


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A function and its arguments; `own` are options of `run_fused`. Several cases may share one."""

    function: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    own: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cache  # noqa: B019
    def report(self, fusion: str) -> Report:
        return run_fused(self.function, *self.inputs(), fusions=fusion, **self.own)[1]


@dataclasses.dataclass(frozen=True)
class Case:
    """A site that is left alone, what is said, and the same with the advice taken, if a test can take it."""

    fusion: str
    site: Call
    reason: str
    hint: str
    cured: Call | None


Table = dict[str, Case]


def entry(table: Table, name: str, site: Call, reason: str, hint: str, cured: Call | None) -> None:
    """Enter a case; the name is the fusion, a colon, and what is wrong."""
    assert name not in table
    table[name] = Case(name.split(": ")[0], site, reason, hint, cured)


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = F32) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape).to(dtype) for shape in shapes)


def marked(inputs: Callable[[], tuple[Tensor, ...]], axis: int) -> Callable[[], tuple[Tensor, ...]]:
    """The inputs, with a dynamic axis in each of them."""

    def make() -> tuple[Tensor, ...]:
        tensors = inputs()
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, axis)
        return tensors

    return make
