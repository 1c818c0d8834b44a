"""What the checks of several ops' arguments share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def known_different(left: Any, right: Any) -> bool:
    """Are two sizes numbers, and not the same? Symbolic sizes are not compared: that would add a guard."""
    return isinstance(left, int) and isinstance(right, int) and left != right


def check_shape(name: str, t: torch.Tensor, wanted: Sequence[Any], axes: str) -> None:
    """`t` has the sizes `wanted`, as far as they are known; `axes` says what they are, such as "[B, T, H]".

    Raises:
        ValueError: another number of axes, or another size.
    """
    if t.dim() != len(wanted) or any(map(known_different, t.shape, wanted)):
        raise ValueError(f"{name} must be {axes} = {list(wanted)}, got shape {list(t.shape)}")
