"""Shared by the tests of `fusion_passes.transformers`: a model's delta rule functions, and what to call them with."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor

from fusion_passes import transformers as door


def modeling(model: torch.nn.Module) -> types.ModuleType:
    return sys.modules[type(model).__module__]


def functions(module: types.ModuleType) -> dict[str, Any]:
    """The functions with which a model computes the rule, by kind."""
    found = {name: value for name, value in vars(module).items() if door.NAME.fullmatch(name)}
    return {"recurrent" if "recurrent" in name else "chunk": value for name, value in found.items()}


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def arguments(
    *, per_channel: bool, tokens: int = 70, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Random arguments of a delta rule function with 2 sequences, 3 heads, 16 key and 8 value channels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, tokens, 3, *shape, generator=generator)

    decay = -draw(16) if per_channel else -draw()
    drawn = {"query": draw(16), "key": draw(16), "value": draw(8), "g": decay.abs(), "beta": draw().sigmoid()}
    drawn["g"] = -drawn["g"]
    return {name: x if name == "g" else x.to(dtype) for name, x in drawn.items()}


def same(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal shapes and dtypes, and values to rounding."""
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            assert difference(a, b) < tolerance
